"""tools/fold.py writes a BatchNorm checkpoint that computes what its table says, or nothing."""

import json
import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import awake
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from test_convert import used
from tiny_detector import make_coco, write_config
from tool_process import succeed
from torch import nn

from dn_mmdet import DNB
from dn_mmdet.checkpoint import check_fits, open_checkpoint
from dn_mmdet.checks.preflight import ConfigError
from dn_mmdet.cli import command_line
from dn_mmdet.convert import batch_norms, dn_layers
from dn_mmdet.deploy import folding as deploy
from dn_mmdet.deploy import trade_off
from dn_mmdet.deploy.folded_config import built, check_twin, folded_config, with_batch_norm
from dn_mmdet.fold import fold_norm

ROOT = Path(__file__).parents[1]
main = runpy.run_path(str(ROOT / 'tools/fold.py'))['main']
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
DATA = ('ssdlite_mbv2_{}_digits', 'ssdlite_mbv2_{}_coco', 'ssdlite_mbv2_{}_voc07_128px')


def config(name):
    return command_line.load_config(ROOT / 'configs' / f'{name}.py')


@pytest.mark.parametrize('norm', ['dnb', 'dnc'])
@pytest.mark.parametrize('name', DATA)
def test_all_folded_the_config_is_the_twin(name, norm):
    init_default_scope('mmdet')
    twin = folded_config(config(name.format(norm)), (), ())
    bn = config(name.format('bn'))
    assert twin.model == bn.model and twin.norm_cfg.type == 'BN'
    assert 'dn_mmdet' not in twin.custom_imports.imports


def test_kinds_and_frozen_norms_have_their_twins():
    init_default_scope('mmdet')
    parts = [
        dict(type='SyncDNB', eps=0.1),
        dict(type='DNB1d', reduction=4),
        dict(type='DNC3d', bn_requires_grad=False),
        dict(type='StaticDN', rank='low'),
        dict(type='DNB', requires_grad=False, momentum=0.3, bound=None),
        dict(type='GN'),
    ]
    assert with_batch_norm(parts) == [
        dict(type='SyncBN', eps=0.1),
        dict(type='BN1d'),
        dict(type='BN3d', requires_grad=False),
        dict(type='BN'),
        dict(type='BN', requires_grad=False, momentum=0.3),
        dict(type='GN'),
    ]
    partly = dict(
        type='PartlyConverted',
        part=dict(type='SSD', norm_cfg=dict(type='BN')),
        norm='DNB',
        only='a',
    )
    assert with_batch_norm(dict(backbone=partly)) == dict(
        backbone=dict(type='SSD', norm_cfg=dict(type='BN'))
    )


@pytest.mark.parametrize(
    'kind, plain',
    [
        ('DNB', 'BN'),
        ('DNC3d', 'BN3d'),
        ('mmengine.SyncDNC', 'SyncBN'),
        ('dn_mmdet.DNC', 'BN'),
        (DNB, 'BN'),
    ],
)
def test_every_way_to_name_a_dn_layer_has_its_batch_norm(kind, plain):
    model = dict(
        necks=[dict(norm_cfg=dict(type=kind, eps=1e-3, momentum=0.03, reduction=8))],
        norm_cfg=dict(type='GN', num_groups=2),
    )
    assert with_batch_norm(model) == dict(
        necks=[dict(norm_cfg=dict(type=plain, eps=1e-3, momentum=0.03))],
        norm_cfg=dict(type='GN', num_groups=2),
    )


def samples():
    """Two images as a data loader gives them to a detector."""
    meta = dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0), img_id=0)
    return dict(inputs=list(X), data_samples=[DetDataSample(metainfo=meta) for _ in X])


@pytest.mark.parametrize(
    'name',
    [
        'faster_rcnn_r50_dnb_coco',
        'rtmdet_tiny_dnb_coco',
        'yolox_tiny_dnb_coco',
        'detr_r50_dnb_coco',
    ],
)
def test_other_detectors_fold_and_load_into_their_twin(name):
    """Two stages, shared convolutions, frozen norms, transformers."""
    cfg = config(name)
    model = awake(built(cfg))
    check_twin(cfg, model)
    names, state = list(dn_layers(model)), model.state_dict()
    for kept in ([], names[3:5]):
        folded = built(cfg)
        folded.load_state_dict(state)
        report = fold_norm(folded, [samples()], keep=kept)
        assert all(row.images >= 2 for row in report)
        twin = built(folded_config(cfg, names, kept))
        twin.load_state_dict(folded.state_dict())
        assert list(dn_layers(twin)) == kept
        for bn, other in zip(
            batch_norms(folded).values(), batch_norms(twin).values(), strict=True
        ):
            assert (type(bn).__name__, bn.eps) == (type(other).__name__, other.eps)
            assert bn.weight.requires_grad == other.weight.requires_grad


def test_training_data_are_read_as_evaluation_reads_them():
    cfg = config('ssdlite_mbv2_dnb_coco')
    dataset = deploy.calibration_dataset(cfg)
    assert cfg.train_dataloader.dataset.type == 'RepeatDataset'
    assert dataset['type'] == 'CocoDataset' and 'train2017' in dataset['ann_file']
    assert dataset['pipeline'] == cfg.val_dataloader.dataset.pipeline
    assert cfg.train_dataloader.dataset.dataset.pipeline != dataset['pipeline']
    mixed = deploy.calibration_dataset(config('yolox_tiny_dnb_coco'))
    assert mixed['type'] == 'CocoDataset'  # and not a mosaic of them


@pytest.fixture
def trained(tmp_path):
    """A tiny detector as after training: its config and checkpoint."""
    make_coco(tmp_path, num_images=8)
    path = write_config(tmp_path, 'DNB')
    cfg = command_line.load_config(path)
    model = used(awake(built(cfg), std=0.1))
    torch.save(
        dict(
            state_dict=model.state_dict(),
            ema_state_dict=dict(steps=torch.ones(1)),
            meta=dict(epoch=3, cfg=cfg.pretty_text),
            optimizer=dict(state={}),
        ),
        tmp_path / 'dnb.pth',
    )
    return path, tmp_path / 'dnb.pth'


def tensors(model, x):
    """The head's outputs, in float64: a network of forty layers rounds."""
    outputs = model.double().eval()(x.double(), mode='tensor')
    return torch.cat([level.flatten() for levels in outputs for level in levels])


@pytest.mark.shows('folding into BatchNorm after training')
def test_writes_a_checkpoint_that_loads_into_the_batch_norm_config(
    trained, tmp_path, capsys, monkeypatch, close
):
    main([*map(str, trained), '--images', '6'])
    out = tmp_path / 'dnb_folded.pth'
    text = out.with_suffix('.md').read_text()
    assert text in capsys.readouterr().out
    checkpoint = open_checkpoint(out)
    assert set(checkpoint) == {'meta', 'state_dict'} and checkpoint['meta']['epoch'] == 3
    twin = built(command_line.load_config(write_config(tmp_path, 'BN')))
    twin.load_state_dict(checkpoint['state_dict'])
    own = Config.fromfile(out.with_suffix('.py'))
    assert (
        'DNB' not in own.pretty_text
        and own.model == command_line.load_config(tmp_path / 'tiny_bn.py').model
    )
    cfg = command_line.load_config(trained[0])
    model = built(cfg)
    model.load_state_dict(open_checkpoint(trained[1])['state_dict'])
    assert not torch.allclose(tensors(model, X), tensors(twin, X), atol=1e-3)
    layers = len(dn_layers(model))
    assert 'all dynamic | ' in text and f'all {layers} folded | ' in text
    assert text.count('| DNB | ') == text.count('| BatchNorm |') == layers
    assert 'Calibrated with 6 training images' in text
    assert plt.imread(out.with_suffix('.png'))[..., :3].std() > 0.01
    told = []
    monkeypatch.setattr('dn_mmdet.checkpoint.tell', told.append)
    check_fits(model, checkpoint, out)  # into the config that it came from
    close(tensors(model, X), tensors(twin, X))
    assert len(told) == 1 and f'written by tools/fold.py: {layers} layers' in told[0]


@pytest.mark.parametrize('keep', ['0', '3'])
def test_a_python_style_config_is_written_as_one_of_names(trained, tmp_path, keep):
    cfg = Config(command_line.load_config(trained[0]).to_dict())
    for key in ('custom_imports', 'default_scope'):
        cfg.pop(key)
    text = cfg.pretty_text.replace("'DNB'", 'DNB').replace("'SSDLiteHead'", 'SSDLiteHead')
    (tmp_path / 'lazy.py').write_text(
        'from dn_mmdet import DNB\n'
        'from dn_mmdet.models.ssdlite_head import SSDLiteHead\n'
        f"default_scope = 'mmdet'\n{text}"
    )
    out = tmp_path / 'out.pth'
    main(
        [str(tmp_path / 'lazy.py'), str(trained[1]), '--images', '4', '--keep', keep]
        + ['--out', str(out)]
    )
    written = Config.fromfile(out.with_suffix('.py'))
    model = built(written)
    model.load_state_dict(open_checkpoint(out)['state_dict'])
    assert len(dn_layers(model)) == int(keep)


def test_a_file_that_appears_meanwhile_is_not_replaced(trained, tmp_path, capsys, monkeypatch):
    out = tmp_path / 'dnb_folded.pth'

    real = deploy.fold

    def fold(*args, **kwargs):
        out.write_text('mine')
        return real(*args, **kwargs)

    monkeypatch.setattr(deploy, 'fold', fold)
    with pytest.raises(SystemExit):
        main([*map(str, trained), '--images', '4'])
    assert 'exists already' in capsys.readouterr().err and out.read_text() == 'mine'


@pytest.mark.parametrize('keep,count', [(['3'], 3), (['neck', '*conv1.bn'], None)])
def test_some_layers_stay_dynamic(trained, tmp_path, keep, count, close):
    out = tmp_path / 'deeper' / 'partly.pth'
    main([*map(str, trained), '--images', '4', '--keep', *keep, '--out', str(out)])
    cfg = Config.fromfile(out.with_suffix('.py'))
    model = MODELS.build(cfg.model)
    checkpoint = open_checkpoint(out)
    model.load_state_dict(checkpoint['state_dict'])
    kept = list(dn_layers(model))
    assert kept == checkpoint['meta']['folded']['dynamic']
    if count:
        assert len(kept) == count
    else:
        assert 'backbone.conv1.bn' in kept and all(
            name.startswith('neck') or name == 'backbone.conv1.bn' for name in kept
        )
    whole = built(command_line.load_config(trained[0]))
    check_fits(whole, checkpoint, out)
    close(tensors(whole, X), tensors(model, X))
    main([str(out.with_suffix('.py')), str(out), '--images', '4'])  # and the others too
    twin = built(command_line.load_config(write_config(tmp_path, 'BN')))
    twin.load_state_dict(open_checkpoint(out.with_stem('partly_folded'))['state_dict'])


def test_changed_images_are_evaluated_with_what_was_calibrated_on_the_usual_ones(
    trained, tmp_path, capsys, monkeypatch
):
    seen = []

    def metrics(self, model):
        batch = next(iter(self.loader))
        prepared = (self.preprocessor or model.data_preprocessor)(batch, False)['inputs']
        seen.append((self.preprocessor is not None, prepared.std().item(), model))
        return {'coco/bbox_mAP': prepared.std().item()}

    monkeypatch.setattr(deploy.Evaluation, 'metrics', metrics)
    changed = ['model.data_preprocessor.std=[583.95,571.2,573.75]']  # a tenth of the contrast
    csv = tmp_path / 'new' / 'folding.csv'
    main([*map(str, trained), '--images', '4', '--csv', str(csv), '--changed', *changed])
    text = capsys.readouterr().out
    assert '| on changed images |' in text
    rows = trade_off.read(csv)
    layers = rows[0]['layers']
    assert [row['dynamic'] for row in rows] == [layers, layers // 2, layers // 4, layers // 8, 0]
    assert all(row['value'] == pytest.approx(10 * row['value_changed'], rel=1e-4) for row in rows)
    assert {row['changed'] for row in rows} == {
        'model.data_preprocessor.std=[583.95, 571.2, 573.75]'
    }
    assert {row['config'] for row in rows} == {'tiny_dnb'} and rows[0]['images'] == 4
    # its statistics come from the images as they are, so that both evaluate one model
    folded = [model for _, _, model in seen if not dn_layers(model)]
    plain, other = (
        next(
            model for is_changed, _, model in seen if is_changed == wanted and not dn_layers(model)
        )
        for wanted in (False, True)
    )
    assert len(folded) > 2
    for ours, theirs in zip(batch_norms(plain).values(), batch_norms(other).values(), strict=True):
        assert torch.equal(ours.bias, theirs.bias)
    main(
        [
            *map(str, trained),
            '--images',
            '4',
            '--csv',
            str(csv),
            '--out',
            str(tmp_path / 'again.pth'),
        ]
    )
    assert len(trade_off.read(csv)) == 10  # the first were of changed images
    assert plt.imread(csv.with_suffix('.png'))[..., :3].std() > 0.01


def test_dnc_folds_exactly_and_needs_no_images(trained, tmp_path, capsys):
    path = write_config(tmp_path, 'DNC')
    cfg = command_line.load_config(path)
    state = open_checkpoint(trained[1])['state_dict']
    torch.save(dict(state_dict=state), tmp_path / 'dnc.pth')
    main([str(path), str(tmp_path / 'dnc.pth')])
    assert 'folding is exact' in capsys.readouterr().out
    model, twin = (built(each).double() for each in (cfg, folded_config(cfg, (), ())))
    model.load_state_dict(state)
    twin.load_state_dict(open_checkpoint(tmp_path / 'dnc_folded.pth')['state_dict'])
    got, expected = tensors(twin, X), tensors(model, X)
    assert (got - expected).norm() < 1e-6 * expected.norm()  # the weights are float32


class Images:
    """Stands for `Calibration`."""

    chosen, trained = range(2), 2

    def batches(self, chosen, batch_size):
        return [X]


@pytest.fixture
def folding():
    """Six layers, of which the first varies most; each one's map costs the same."""
    model = nn.Sequential(*(awake(DNB(3), std) for std in (0.6, 0.5, 0.4, 0.3, 0.2, 0.1)))
    folding = deploy.Folding.__new__(deploy.Folding)
    folding.model, folding.values, folding.log = model.eval(), {}, lambda text: None
    folding.calibration, folding.outputs = Images(), deploy.calibrate(model, [X])
    folding.report, folding.halves = deploy.measure(model, folding.outputs), [folding.outputs]
    folding.values_per_image = lambda: dict.fromkeys('012345', 1)
    return folding


@pytest.mark.parametrize('needed', [(), ('0',), ('1', '4'), ('5',)], ids=str)
def test_the_search_keeps_what_the_metric_needs(folding, needed):
    folding.evaluation = lambda model: 0.5 - 0.1 * len(set(needed) - set(dn_layers(model)))
    assert set(folding.search(0.05)) == set(needed)
    assert set(folding.search(0.5)) == set()


@pytest.mark.parametrize('better', [0, 1])
def test_running_statistics_estimated_again_are_taken_where_they_help(folding, better):
    mean = X.mean((0, 2, 3))

    def evaluation(model):
        recalibrated = not isinstance(model[0], DNB) and torch.allclose(
            model[0].running_mean, mean
        )
        return 0.5 + better * recalibrated

    folding.evaluation = evaluation
    assert folding.best(['1']) == (0.5 + better, bool(better))
    assert folding.best(['1'], enough=0.5) == (0.5, False)
    assert folding.best('012345') == (0.5, False)  # nothing was folded
    assert evaluation(folding.final(['1'], True)) == 0.5 + better
    folding.halves = None  # folding is exact
    assert folding.best(['1']) == (0.5, False)


def test_a_classifier_of_mmpretrain(tmp_path, capsys, monkeypatch):
    pytest.importorskip('mmpretrain', reason="needs the extra 'cls'", exc_type=ImportError)
    import mmcv

    for split in ('train', 'val'):
        for label in range(6):
            for i in range(2):
                pixels = torch.randint(0, 100, (32, 32, 3)) + 20 * label
                mmcv.imwrite(
                    pixels.numpy().astype('uint8'),
                    str(tmp_path / f'data/tinyin100/{split}/n{label}/{i}.JPEG'),
                )
    monkeypatch.chdir(tmp_path)
    options = [
        'model.head.num_classes=6',
        'val_dataloader.num_workers=0',
        'val_dataloader.persistent_workers=False',
    ]
    path = ROOT / 'configs/mobilenetv2_dnb_tinyin100_32px.py'
    cfg = command_line.load_config(path)
    cfg.model.head.num_classes = 6
    model = used(awake(built(cfg)))
    assert model.data_preprocessor.mean.any()
    torch.save(dict(state_dict=model.state_dict()), 'dnb.pth')
    main([str(path), 'dnb.pth', '--keep', '5', '--images', '4', '--cfg-options', *options])
    text = capsys.readouterr().out
    assert '| layers | accuracy/top1 |' in text and '| 5 of 52 dynamic |' in text
    own = built(Config.fromfile('dnb_folded.py'))
    own.load_state_dict(open_checkpoint('dnb_folded.pth')['state_dict'])
    assert len(dn_layers(own)) == 5 and torch.equal(
        own.data_preprocessor.mean, model.data_preprocessor.mean
    )


def refused(tmp_path, capsys, *argv):
    """The message with which the tool ends, having written nothing."""
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in argv])
    assert ended.value.code == 2 and sorted(tmp_path.rglob('*')) == before
    return capsys.readouterr().err


@pytest.mark.parametrize(
    'options,message',
    [
        (['--images', '1'], '--images: expected at least 2'),
        (['--max-drop', '-1'], '--max-drop: expected a number of at least 0'),
        (['--keep', 'layer9'], "keep: 'layer9' matches none of"),
        (['--keep', '999'], 'keep: expected 0 to'),
        (['--metric', 'mAP'], "--metric: the evaluator gives no 'mAP', but coco/bbox_mAP"),
        (['--out', 'folded.onnx'], '--out: expected a file name in .pth'),
    ],
    ids=str,
)
def test_bad_options_write_nothing(trained, tmp_path, capsys, options, message):
    assert message in refused(tmp_path, capsys, *trained, *options)


def test_a_config_or_checkpoint_that_cannot_be_folded_is_refused(trained, tmp_path, capsys):
    bn = write_config(tmp_path, 'BN')
    assert 'found no DN layer to fold' in refused(tmp_path, capsys, bn, trained[1])
    state = open_checkpoint(trained[1])['state_dict']
    state['backbone.conv1.bn.bn.weight'] = torch.ones(3)
    torch.save(dict(state_dict=state), tmp_path / 'other.pth')
    assert '1 of another size' in refused(tmp_path, capsys, trained[0], tmp_path / 'other.pth')
    (tmp_path / 'runs.csv').write_text('question,data\n')
    assert 'runs.csv: expected the columns data, config' in refused(
        tmp_path, capsys, *trained, '--csv', tmp_path / 'runs.csv'
    )
    assert (
        'no such annotation file'
        in refused(
            tmp_path, capsys, *trained, '--changed', 'val_dataloader.dataset.ann_file=absent.json'
        ).lower()
    )
    message = refused(tmp_path, capsys, *trained, '--csv', tmp_path / 'dnb_folded.csv')
    assert '--csv: expected a file name in .csv that differs from that of' in message
    (tmp_path / 'mine.png').write_text('mine')
    message = refused(tmp_path, capsys, *trained, '--csv', tmp_path / 'mine.csv')
    assert 'mine.png: exists already' in message
    (tmp_path / 'dnb_folded.md').write_text('of an earlier run')
    assert 'exists already' in refused(tmp_path, capsys, *trained)


def test_broken_weights_are_told_and_nothing_is_written(trained, tmp_path, capsys):
    checkpoint = open_checkpoint(trained[1])
    checkpoint['state_dict']['backbone.conv1.conv.weight'][0] = float('nan')
    torch.save(checkpoint, trained[1])
    message = refused(tmp_path, capsys, *trained, '--images', '2')
    assert 'batch 0: the statistics in backbone.conv1.bn are not finite' in message


def test_a_twin_that_differs_in_more_than_the_norm_is_refused(trained):
    cfg = command_line.load_config(trained[0])
    model = built(cfg)
    model.backbone.extra = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match='in more than the norm, in 2 weights .backbone.extra.b'):
        check_twin(cfg, model)


@pytest.mark.slow
def test_the_metric_is_that_of_the_test_tool(tmp_path):
    make_coco(tmp_path, num_images=8)
    path = write_config(tmp_path, 'DNB')
    succeed(
        'train',
        path,
        '--work-dir',
        tmp_path / 'run',
        '--cfg-options',
        'train_cfg.max_epochs=30',
        'train_cfg.val_interval=30',
        cwd=tmp_path,
    )
    output = succeed(
        'fold',
        path,
        tmp_path / 'run/epoch_30.pth',
        '--images',
        '8',
        '--keep',
        '4',
        '--out',
        tmp_path / 'folded.pth',
        cwd=tmp_path,
    )
    value = float(re.search(r'\| 4 of \d+ dynamic \| ([\d.]+) \|', output)[1])
    assert value > 0
    succeed(
        'test',
        tmp_path / 'folded.py',
        tmp_path / 'folded.pth',
        '--work-dir',
        tmp_path / 'test',
        cwd=tmp_path,
    )
    (log,) = (tmp_path / 'test').glob('*/*.json')
    assert json.loads(log.read_text())['coco/bbox_mAP'] == pytest.approx(value, abs=1e-3)
