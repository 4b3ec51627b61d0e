import functools
import http.server
import io
import logging
import pickle
import threading
import zipfile

import numpy as np
import pytest
import torch
from hostile import write_hostile
from mmdet.registry import PARAM_SCHEDULERS as MMDET_SCHEDULERS
from mmdet.utils import register_all_modules
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_SCHEDULERS
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner.checkpoint import load_from_http, load_from_local
from torch import nn

from dn_mmdet import DNB, DNC
from dn_mmdet.checkpoint import (
    CheckpointError,
    check_fits,
    check_resumable,
    open_checkpoint,
    safe_loading,
    weights,
)
from dn_mmdet.layers import dn_layers_in

HOSTILE = ('zip', 'legacy', 'pickle')


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with all that mmengine puts into one."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(
        meta=dict(
            epoch=1,
            iter=2,
            cfg='norm_cfg=dict(type="BN")',
            experiment_name='one',
            dataset_meta=dict(classes=('cat', 'dog'), palette=[(1, 2, 3)]),
        ),
        state_dict=net(nn.BatchNorm2d).state_dict(),
        message_hub=dict(
            log_scalars=dict(loss=history),
            resumed_keys=dict(loss=True),
            runtime_info=dict(
                best=np.float64(0.5),
                count=np.int64(3),
                flag=np.bool_(True),
                names=np.array(['a', 'bc']),
            ),
        ),
        optimizer=torch.optim.SGD(net(DNB).parameters(), 0.1).state_dict(),
        param_schedulers=[dict(last_step=2, milestones=slice(1, 2))],
    )
    path = tmp_path / 'epoch_1.pth'
    torch.save(content, path)
    return path


def net(norm):
    return nn.Sequential(nn.Conv2d(3, 8, 1), norm(8))


def test_opens_all_that_mmengine_writes(saved):
    opened = open_checkpoint(saved)
    info = opened['message_hub']['runtime_info']
    assert (info['best'], info['count'], info['flag']) == (0.5, 3, True)
    assert info['names'].tolist() == ['a', 'bc']
    assert opened['message_hub']['log_scalars']['loss'].statistics('mean') == 1.5
    assert opened['param_schedulers'][0]['milestones'] == slice(1, 2)
    assert opened['meta']['dataset_meta']['classes'] == ('cat', 'dog')


SCHEDULERS = dict(
    ConstantLR={},
    CosineAnnealingLR=dict(T_max=4),
    ExponentialLR=dict(gamma=0.5),
    LinearLR={},
    MultiStepLR=dict(milestones=[2, 3]),
    StepLR=dict(step_size=2),
    PolyLR={},
    OneCycleLR=dict(eta_max=1, total_steps=9),
    ReduceOnPlateauLR=dict(monitor='loss'),
    CosineRestartLR=dict(periods=[2, 2], restart_weights=[1, 1], eta_min=0),
    QuadraticWarmupLR=dict(by_epoch=True, begin=0, end=4),
)


@pytest.mark.parametrize(
    'name, args',
    [
        *SCHEDULERS.items(),
        ('OneCycleLR', dict(eta_max=1, total_steps=9, anneal_strategy='linear')),
    ],
)
def test_opens_the_state_of_every_scheduler(name, args, tmp_path):
    register_all_modules()  # QuadraticWarmupLR is mmdet's
    optimizer = torch.optim.SGD(net(nn.BatchNorm2d).parameters(), 0.1)
    kinds = {**MMENGINE_SCHEDULERS.module_dict, **MMDET_SCHEDULERS.module_dict}
    scheduler = kinds[name](optimizer, **args)
    torch.save(dict(param_schedulers=[scheduler.state_dict()]), tmp_path / 'state.pth')
    scheduler.load_state_dict(open_checkpoint(tmp_path / 'state.pth')['param_schedulers'][0])


@pytest.mark.parametrize('name', ['numpy.core', 'numpy._core'])
def test_opens_what_numpy_1_and_2_write(saved, tmp_path, name):
    other = tmp_path / 'other.pth'
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(other, 'w') as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith('data.pkl'):
                for core in (b'numpy._core', b'numpy.core'):
                    data = data.replace(core + b'.multiarray', name.encode() + b'.multiarray')
                assert name.encode() in data
            new.writestr(entry.filename, data)
    assert open_checkpoint(other)['message_hub']['runtime_info']['count'] == 3


@pytest.mark.parametrize('kind', HOSTILE)
def test_a_hostile_checkpoint_is_refused_and_not_executed(tmp_path, kind):
    executed = write_hostile(tmp_path / 'x.pth', kind)
    with pytest.raises(CheckpointError, match='x.pth'):
        open_checkpoint(tmp_path / 'x.pth')
    assert not executed.exists()


def test_the_refusal_names_what_would_have_run(tmp_path):
    write_hostile(tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'not executed.*posix\.mkdir.*--trust-checkpoint'):
        open_checkpoint(tmp_path / 'x.pth')


@pytest.mark.parametrize('kind', ['zip', 'legacy'])
def test_trust_executes(tmp_path, kind):
    """Without this the tests above would prove nothing."""
    executed = write_hostile(tmp_path / 'x.pth', kind)
    open_checkpoint(tmp_path / 'x.pth', trust=True)
    assert executed.is_dir()


def test_getattr_in_a_checkpoint_reaches_nothing_but_known_functions(tmp_path):

    class Reach:
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')

    torch.save(dict(x=Reach()), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match='not executed.*__init__'):
        open_checkpoint(tmp_path / 'x.pth')


def test_arrays_of_objects_are_refused(tmp_path):
    torch.save(dict(x=np.array([None, {}], dtype=object)), tmp_path / 'x.pth')
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / 'x.pth')


def test_text_that_mmengine_would_run_on_resume_is_left_out(tmp_path):
    torch.save(dict(meta=dict(config='import os', cfg='kept')), tmp_path / 'x.pth')
    assert open_checkpoint(tmp_path / 'x.pth')['meta'] == dict(cfg='kept')


def _script():
    file = io.BytesIO()
    torch.save([1], file)
    return file.getvalue()


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'truncated'),
        (b'hello\n', 'truncated'),
        (bytes(range(256)) * 9, 'truncated'),
        (pickle.dumps({}), 'truncated'),
        (_script(), 'expected a checkpoint'),
    ],
    ids=['empty', 'text', 'noise', 'pickle', 'list'],
)
def test_what_is_no_checkpoint_is_told(tmp_path, content, message):
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / 'x.pth')


@pytest.mark.parametrize('share', [0.2, 0.9, 0.999])
def test_a_truncated_checkpoint_is_told(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match='truncated'):
        open_checkpoint(saved)


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(CheckpointError, match='no such checkpoint file'):
        open_checkpoint(tmp_path / 'x.pth')


@pytest.mark.parametrize('kind', HOSTILE)
def test_mmengine_loads_safely_within_the_context(saved, tmp_path, kind):
    executed = write_hostile(tmp_path / 'x.pth', kind)
    with safe_loading():
        assert load_checkpoint(net(nn.BatchNorm2d), str(saved), strict=True)['meta']['epoch'] == 1
        with pytest.raises(CheckpointError):
            load_checkpoint(net(nn.BatchNorm2d), str(tmp_path / 'x.pth'))
        with pytest.raises(CheckpointError):
            BaseModule(dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth'))).init_weights()
    assert not executed.exists()


def test_the_context_restores_the_loaders():
    with pytest.raises(KeyError), safe_loading():
        raise KeyError
    assert CheckpointLoader._get_checkpoint_loader('x.pth') is load_from_local
    assert CheckpointLoader._get_checkpoint_loader('https://x.pth') is load_from_http


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address at which tmp_path is served; downloads go to a cache of the test's own."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    with http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=tmp_path)
    ) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{httpd.server_port}'
        httpd.shutdown()
        thread.join()


def test_downloads_are_opened_safely(saved, tmp_path, server):
    executed = write_hostile(tmp_path / 'x.pth')
    with safe_loading():
        assert load_checkpoint(net(nn.BatchNorm2d), f'{server}/{saved.name}')['meta']['iter'] == 2
        with pytest.raises(CheckpointError, match='posix.mkdir'):
            load_checkpoint(net(nn.BatchNorm2d), f'{server}/x.pth')
        with pytest.raises(CheckpointError, match='cannot be fetched'):
            load_checkpoint(net(nn.BatchNorm2d), f'{server}/absent.pth')
    assert not executed.exists()
    assert not (tmp_path / 'hub' / 'checkpoints' / 'absent.pth').exists()


@pytest.mark.parametrize(
    'address',
    [
        'torchvision://no_such_net',
        'open-mmlab://no_such_net',
        'pavi://x',
        's3://bucket/x.pth',
        'mmcls://resnet',
    ],
)
def test_addresses_without_a_safe_loader_are_refused(address):
    with safe_loading(), pytest.raises(CheckpointError, match=address):
        load_checkpoint(net(nn.BatchNorm2d), address)


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, DNB, DNC])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_weights_fit_their_own_model(norm, prefix):
    state = {prefix + key: value for key, value in net(norm).state_dict().items()}
    check_fits(net(norm), dict(state_dict=state), 'x.pth')
    check_fits(net(norm), state, 'x.pth')


@pytest.mark.parametrize('norm', [DNB, DNC])
def test_batch_norm_weights_fit_a_dn_model_and_that_is_said(norm, caplog):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance(f'fits{norm.__name__}')
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING):
        check_fits(net(norm), net(nn.BatchNorm2d).state_dict(), 'x.pth')
    assert 'x.pth holds no SC weights' in caplog.text


@pytest.mark.parametrize('whole', [True, False])
def test_dn_weights_do_not_fit_a_bn_model(whole):
    checkpoint = dict(state_dict=net(DNB).state_dict(), meta=dict(experiment_name='one_2026'))
    with pytest.raises(CheckpointError, match="BatchNorm2d.*norm_cfg to type='DNB'.*one_2026"):
        check_fits(net(nn.BatchNorm2d), checkpoint, 'x.pth', whole=whole)


@MODELS.register_module()
class OwnSC(nn.Module):
    """With other parameters than SC."""

    inputs, bound = 'raw', None

    def __init__(self, num_features, **arguments):
        super().__init__()
        self.num_features = num_features
        self.own = nn.Parameter(torch.ones(2, num_features))


def own(num_features):
    return DNB(num_features, sc=dict(type='OwnSC'))


def test_a_training_may_start_from_weights_of_another_meaning_and_that_is_said(caplog):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance('meaning')
    logger.addHandler(caplog.handler)
    meta = dict(cfg="norm_cfg=dict(bound=0.5, type='DNC')")
    checkpoint = dict(state_dict=net(DNC).state_dict(), meta=meta)
    with caplog.at_level(logging.WARNING):
        check_fits(net(DNB), checkpoint, 'x.pth', whole=False)
    assert 'trained with DN-C, the config builds DN-B' in caplog.text
    assert 'trained with bound=0.5' in caplog.text and 'starts from them' in caplog.text


@pytest.mark.parametrize('whole', [True, False])
def test_an_sc_of_another_kind_is_one_too(whole, caplog):
    from mmengine.logging import MMLogger

    logger = MMLogger.get_instance('own')
    logger.addHandler(caplog.handler)
    trained = net(own).state_dict()
    with caplog.at_level(logging.WARNING):
        check_fits(net(own), dict(trained), 'x.pth', whole=whole)
    assert 'holds no SC weights' not in caplog.text
    with pytest.raises(CheckpointError, match="BatchNorm2d.*norm_cfg to type='DNB'"):
        check_fits(net(nn.BatchNorm2d), dict(trained), 'x.pth', whole=whole)


def test_a_shortcut_of_that_name_is_no_sc():
    block = nn.Sequential()
    block.conv, block.bn, block.sc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(3, 4, 1)
    assert dn_layers_in(block.state_dict()) == dn_layers_in([]) == set()
    del block.conv  # the shortcut is the convolution
    assert dn_layers_in(block.state_dict()) == set()
    layer = DNB(4, affine=False, track_running_stats=False)
    assert dn_layers_in(layer.state_dict()) == {''}
    assert dn_layers_in(nn.Sequential(block, layer, own(4)).state_dict()) == {'1', '2'}


def test_dnb_and_dnc_weights_are_told_apart_by_the_config_that_they_carry():
    meta = dict(cfg="norm_cfg=dict(eps=0.001, type='DNC')")
    checkpoint = dict(state_dict=net(DNC).state_dict(), meta=meta)
    check_fits(net(DNC), checkpoint, 'x.pth')
    with pytest.raises(CheckpointError, match='trained with DN-C, the config builds DN-B'):
        check_fits(net(DNB), checkpoint, 'x.pth')


@pytest.mark.parametrize(
    'then, now, said',
    [
        ("type='DNB', inputs='standardized'", dict(), "inputs='standardized'.*sets 'raw'"),
        ("type='DNB', bound=0.5", dict(bound=2.0), r'bound=0\.5 .*sets 2\.0'),
        ("type='DNC', bound=None", dict(), r'bound=None .*sets 0\.25'),
    ],
)
def test_weights_of_other_settings_of_sc_are_refused(then, now, said):
    cls = DNC if 'DNC' in then else DNB
    meta = dict(cfg=f'model = dict(backbone=dict(norm_cfg=dict({then})))')
    with pytest.raises(CheckpointError, match=f'x.pth: trained with {said}'):
        check_fits(
            nn.Sequential(cls(3, **now)),
            dict(state_dict=nn.Sequential(cls(3)).state_dict(), meta=meta),
            'x.pth',
        )


@pytest.mark.parametrize(
    'text, layer',
    [
        ("[dict(type='DNB', bound=0.5), dict(type='DNB', bound=0.25)]", DNB(3)),
        ("dict(type='DNB')", DNB(3, bound=0.5)),  # of a time with another default
        ("dict(type='DNB', sc=dict(type='SC', bound=1.0))", DNB(3, sc=dict(type='SC', bound=1.0))),
        ("dict(type='DNB', bound=0.5, sc=dict(type='SC', bound=1.0))", DNB(3)),
        ("dict(type='DNB', bound=1 / 4)", DNB(3)),
    ],
)
def test_settings_that_a_config_does_not_say_for_all_are_no_reason(text, layer):
    state = nn.Sequential(layer).state_dict()
    check_fits(
        nn.Sequential(layer), dict(state_dict=state, meta=dict(cfg=f'model = {text}')), 'x.pth'
    )


def test_a_meta_that_is_a_text_says_nothing():
    state = nn.Sequential(DNB(3)).state_dict()
    check_fits(nn.Sequential(DNB(3)), dict(state_dict=state, meta='notes'), 'x.pth')


class OwnDNC(DNC):
    """A user's subclass."""


@pytest.mark.parametrize(
    'kind',
    [
        "'DNC'",
        "'SyncDNC'",
        "'DNC3d'",
        "'mmengine.DNC'",
        "'dn_mmdet.DNC'",
        "'dn_mmdet.layers.DNC'",
        'dn_mmdet.layers.DNC',
        'dn_mmdet.layers.SyncDNC',
        f"'{OwnDNC.__module__}.OwnDNC'",
        f'{OwnDNC.__module__}.OwnDNC',
    ],
)
@pytest.mark.parametrize(
    'text',
    [
        "model = dict(\n    neck=[dict(norm_cfg=dict(eps=0.001, type={}))])\nn = dict(type='DNB')",
        "model = {{'neck': dict(a=1), 'norm_cfg': {{'type': {}}}}}",
    ],
    ids=['dict', 'braces'],
)
def test_a_checkpoint_may_name_its_norm_in_every_way(kind, text):
    """As mmengine writes configs, with classes as paths, in quotes or without."""
    meta = dict(cfg=text.format(kind))
    checkpoint = dict(state_dict=net(DNC).state_dict(), meta=meta)
    check_fits(net(DNC), checkpoint, 'x.pth')
    with pytest.raises(CheckpointError, match='trained with DN-C, the config builds DN-B'):
        check_fits(net(DNB), checkpoint, 'x.pth')


@pytest.mark.parametrize(
    'text',
    [
        None,
        '',
        3,
        'no ( python',
        'x = ' + '(' * 5000,
        "model = dict(type='DNX')",
        'model = 1',
        "model = dict(type=open('x'))",
        '\0',
    ],
)
def test_a_config_that_says_nothing_is_no_error(text):
    checkpoint = dict(state_dict=net(DNB).state_dict(), meta=dict(cfg=text))
    check_fits(net(DNB), checkpoint, 'x.pth')


def test_the_config_in_a_checkpoint_is_never_executed(tmp_path, monkeypatch):
    (tmp_path / 'named_by_a_checkpoint.py').write_text(f"open('{tmp_path}/executed', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    for text in (
        f"model = dict(type=open('{tmp_path}/executed', 'w'))",
        "model = dict(type='named_by_a_checkpoint.Norm')",
        'model = dict(type=named_by_a_checkpoint)',
    ):
        checkpoint = dict(state_dict=net(DNB).state_dict(), meta=dict(cfg=text))
        check_fits(net(DNB), checkpoint, 'x.pth')
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize(
    'other, message',
    [
        (nn.Sequential(nn.Conv2d(3, 9, 1), nn.BatchNorm2d(9)), r'6 of another size'),
        (nn.Sequential(nn.Conv2d(3, 8, 1)), r'5 missing \(such as 1.bias\)'),
        (nn.Sequential(*net(nn.BatchNorm2d), nn.Conv2d(8, 8, 1)), r'2 not in the model'),
    ],
    ids=['size', 'missing', 'unexpected'],
)
def test_weights_of_another_architecture_do_not_fit(other, message):
    with pytest.raises(CheckpointError, match='not of the model'):
        check_fits(net(nn.BatchNorm2d), other.state_dict(), 'x.pth')


def test_training_may_start_from_a_part_of_the_weights_but_not_from_none():
    part = nn.Sequential(nn.Conv2d(3, 8, 1))
    check_fits(net(DNB), part.state_dict(), 'x.pth', whole=False)
    with pytest.raises(CheckpointError, match='not of the model'):
        check_fits(net(DNB), nn.Linear(2, 2).state_dict(), 'x.pth', whole=False)


def test_a_file_without_weights_is_told():
    with pytest.raises(CheckpointError, match='found classes, epoch'):
        weights(dict(classes=3, epoch=1), 'x.pth')


def test_weights_alone_cannot_be_resumed(saved):
    check_resumable(open_checkpoint(saved), saved)
    with pytest.raises(CheckpointError, match='lacks meta, .*load_from=x.pth'):
        check_resumable(dict(state_dict={}), 'x.pth')
