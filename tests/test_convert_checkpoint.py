"""tools/convert_checkpoint.py writes a checkpoint that computes the same, or nothing."""

import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from hostile import write_hostile
from mmengine.registry import MODELS
from test_convert import used
from tiny_detector import write_config
from torch import nn

from dn_mmdet import DNB
from dn_mmdet.checkpoint import open_checkpoint
from dn_mmdet.cli import command_line
from dn_mmdet.convert import convert_norm
from dn_mmdet.experiments.ablation import VariantSC

main = runpy.run_path(str(Path(__file__).parents[1] / 'tools/convert_checkpoint.py'))['main']


def saved(path, content):
    torch.save(content, path)
    return str(path)


def detector(config):
    model = MODELS.build(command_line.load_config(config).model)
    return used(model).double().eval()


def test_a_backbones_weights(tmp_path, close, capsys):
    source = used(torchvision.models.resnet18(weights=None)).double().eval()
    path, out = saved(tmp_path / 'bn.pth', source.state_dict()), tmp_path / 'deeper' / 'dn.pth'
    main([path, str(out), '--min-channels', '4'])
    assert '20 BatchNorms converted, 0 left' in capsys.readouterr().out
    model = convert_norm(torchvision.models.resnet18(weights=None), 'DNB', min_channels=4)
    model = model.double().eval()
    model.load_state_dict(open_checkpoint(out))
    x = torch.randn(1, 3, 64, 64).double()
    close(model(x), source(x))


@pytest.mark.shows('BatchNorm checkpoints')
def test_a_detectors_checkpoint_by_its_config(tmp_path, close):
    source = detector(write_config(tmp_path, 'BN'))
    content = dict(
        meta=dict(epoch=3, cfg='of BN'), state_dict=source.state_dict(), optimizer=dict(state={})
    )
    config, out = write_config(tmp_path, 'DNB'), tmp_path / 'dn.pth'
    main([saved(tmp_path / 'bn.pth', content), str(out), '--config', str(config)])
    converted = open_checkpoint(out)
    assert converted['meta']['epoch'] == 3 and "type='DNB'" in converted['meta']['cfg']
    assert 'optimizer' not in converted
    model = detector(config)
    model.load_state_dict(converted['state_dict'])
    x = torch.randn(1, 3, 64, 64).double()
    for got, expected in zip(model(x, mode='tensor'), source(x, mode='tensor'), strict=True):
        close(
            torch.cat([level.flatten() for level in got]),
            torch.cat([level.flatten() for level in expected]),
        )


def refused(tmp_path, capsys, *argv):
    """The message with which the tool ends, having written nothing."""
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in argv])
    assert ended.value.code == 2 and sorted(tmp_path.rglob('*')) == before
    return capsys.readouterr().err


def test_the_way_back_is_refused(tmp_path, capsys):
    state = convert_norm(torchvision.models.resnet18(weights=None)).state_dict()
    message = refused(tmp_path, capsys, saved(tmp_path / 'dn.pth', state), tmp_path / 'out.pth')
    layer = DNB(8)
    layer.sc = VariantSC(8, hidden='channelwise')
    state = nn.Sequential(layer).state_dict()
    assert message == refused(
        tmp_path, capsys, saved(tmp_path / 'dn.pth', state), tmp_path / 'out.pth'
    )
    assert 'not enough to go back to BatchNorm' in message and 'from image to image' in message


def test_a_checkpoint_of_other_shapes_names_its_first_layer(tmp_path, capsys):
    config = write_config(tmp_path, 'DNB')
    state = detector(write_config(tmp_path, 'BN')).state_dict()
    state['backbone.conv1.bn.weight'] = torch.ones(3)
    message = refused(
        tmp_path,
        capsys,
        saved(tmp_path / 'bn.pth', dict(state_dict=state)),
        tmp_path / 'out.pth',
        '--config',
        config,
    )
    assert '1 of another size (such as backbone.conv1.bn.' in message


def test_a_config_without_dn_layers_is_refused(tmp_path, capsys):
    config = write_config(tmp_path, 'BN')
    path = saved(tmp_path / 'bn.pth', detector(config).state_dict())
    message = refused(tmp_path, capsys, path, tmp_path / 'out.pth', '--config', config)
    assert 'builds no DN layers' in message


def test_what_exists_is_not_replaced(tmp_path, capsys):
    path = saved(tmp_path / 'bn.pth', torchvision.models.resnet18(weights=None).state_dict())
    assert 'exists already' in refused(tmp_path, capsys, path, path)


def test_a_hostile_checkpoint_is_not_executed(tmp_path, capsys):
    mark = write_hostile(tmp_path / 'hostile.pth')
    message = refused(tmp_path, capsys, tmp_path / 'hostile.pth', tmp_path / 'out.pth')
    assert 'refused and not executed' in message and not mark.exists()
