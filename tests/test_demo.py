"""The demo trains both twins at once and shows what came out."""
import json
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from mmengine.config import Config
from rich.console import Console
from tiny_detector import make_coco, write_config

ROOT = Path(__file__).parents[1]
DEMO = runpy.run_path(str(ROOT / 'tools' / 'demo.py'))


@pytest.fixture
def twins(tmp_path):
    (tmp_path / 'images').mkdir()
    make_coco(tmp_path)
    return [DEMO['Twin'](name, write_config(tmp_path, norm), tmp_path / 'demo' / norm)
            for name, norm in (('BN', 'BN'), ('DN-B', 'DNB'))]


@pytest.mark.slow
def test_leaves_figures_and_results_of_both(twins, tmp_path):
    out, console = tmp_path / 'demo', Console(record=True, width=200)
    earlier = [out / 'images' / 'old.png', twins[0].folder / 'epoch_9.pth']
    for path in earlier:
        path.parent.mkdir(parents=True)
        path.write_text('of an earlier demo')
    DEMO['run'](twins, out, 0, console)
    assert not any(path.exists() for path in earlier)
    found = json.loads((out / 'results.json').read_text())
    assert list(found) == ['BN', 'DN-B']
    assert found['DN-B']['parameters'] > found['BN']['parameters']
    text = console.export_text()
    for row in found.values():
        assert 0 <= row['AP'] <= row['AP50'] <= 1 and row['loss'] > 0
        assert f'{row["AP"]:.3f}' in text and f'{row["loss"]:.2f}' in text
    for name in ('learning_curves.png', 'detections.png'):
        assert plt.imread(out / name)[..., :3].std() > 0.01  # something is drawn


@pytest.mark.slow
def test_a_failing_training_ends_the_other_and_shows_its_log(twins, tmp_path):
    cfg = Config.fromfile(twins[1].config)
    cfg.train_dataloader.dataset.data_root = str(tmp_path / 'nowhere')
    cfg.dump(twins[1].config)
    with pytest.raises(DEMO['ChildFailed'], match='DN-B.*exit code 2.*'):
        DEMO['train'](twins, 0, 2, Console(file=sys.stderr))
    log = twins[1].log.read_text()
    assert 'nowhere' in log
