"""Configs written before the modules moved still work."""

import importlib
import subprocess
import sys

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.utils import import_modules_from_strings
from tiny_detector import write_config

from dn_mmdet.cli.command_line import load_config
from dn_mmdet.models.ssdlite_head import SSDLiteHead
from dn_mmdet.renamed import RENAMED


@pytest.mark.parametrize('old', RENAMED)
def test_an_old_name_is_the_module_of_today(old):
    if old == 'dn_mmdet.classification':
        pytest.importorskip('mmpretrain')
    today = importlib.import_module(RENAMED[old])
    assert importlib.import_module(old) is today
    assert today.__name__ == today.__spec__.name == RENAMED[old]


def test_the_config_of_a_finished_training_loads(tmp_path):
    """As its work folder has it: with the imports of that time."""
    cfg = Config.fromfile(write_config(tmp_path))
    cfg.custom_imports = dict(
        imports=['dn_mmdet', 'dn_mmdet.ssdlite_head', 'dn_mmdet.recording'],
        allow_failed_imports=False,
    )
    cfg.dump(tmp_path / 'old.py')
    assert isinstance(MODELS.build(load_config(tmp_path / 'old.py').model).bbox_head, SSDLiteHead)


def test_in_a_process_that_knows_only_the_old_name():
    done = subprocess.run(
        [
            sys.executable,
            '-W',
            'ignore',
            '-c',
            'from dn_mmdet.controls import StaticDN; print(StaticDN.__module__)',
        ],
        capture_output=True,
        text=True,
    )
    assert done.stdout == 'dn_mmdet.experiments.controls\n', done.stderr


def test_other_names_are_still_refused():
    with pytest.raises(ImportError):
        import_modules_from_strings(['dn_mmdet.clasification'])
