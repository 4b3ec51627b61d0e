"""The demo trains both twins at once and shows what came out."""

import re
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from mmengine.config import Config
from rich.console import Console
from tiny_detector import make_coco, write_config

from dn_mmdet.checkpoint import open_checkpoint
from dn_mmdet.deploy.folded_config import built
from dn_mmdet.experiments import results
from dn_mmdet.messages import ConfigError

ROOT = Path(__file__).parents[1]
DEMO = runpy.run_path(str(ROOT / 'tools' / 'demo.py'))


@pytest.fixture
def configs(tmp_path):
    (tmp_path / 'images').mkdir()
    make_coco(tmp_path)
    return [Path(write_config(tmp_path, norm)) for norm in ('BN', 'DNB')]


@pytest.mark.slow
def test_leaves_figures_and_results_of_both(configs, tmp_path):
    out, console = tmp_path / 'demo', Console(record=True, width=200)
    earlier = [out / 'images' / 'old.png', out / 'runs' / 'epoch_9.pth']
    DEMO['clear'](out)  # as an earlier demo begins
    for path in earlier:
        path.parent.mkdir(parents=True)
        path.write_text('of an earlier demo')
    DEMO['run'](configs, out, 0, console)
    assert not any(path.exists() for path in earlier)
    bn, dnb = results.read_rows(out / 'report' / 'runs.csv')
    assert (bn['norm'], dnb['norm']) == ('BN', 'DNB')
    assert dnb['params'] > bn['params'] and bn['status'] == dnb['status'] == 'finished'
    assert bn['config'] in console.export_text(clear=False)
    text = console.export_text()
    assert 'paired difference' in text
    assert 'differs by up to 0.1 between two machines' in text
    assert 'tools/compare.py' in text and '--norm DNB' in text  # what to try next
    table = re.findall(r'^\| (BN|DN-B|DN-B, all \d+ folded) \| [\d.]+ \| ([\d.]+) \|$', text, re.M)
    assert len(table) == 3 and all(float(took) > 0 for _, took in table)
    twin = built(Config.fromfile(configs[0]))
    twin.load_state_dict(open_checkpoint(out / 'folded.pth')['state_dict'])
    for name in ('report/learning_curves.png', 'detections.png'):
        assert plt.imread(out / name)[..., :3].std() > 0.01  # something is drawn


@pytest.mark.parametrize('name', ['runs/epoch_9.pth', 'images/a.png', 'folded.pth'])
def test_files_that_no_demo_has_written_are_refused(configs, tmp_path, name):
    mine = tmp_path / 'demo' / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text('mine')
    with pytest.raises(ConfigError, match='expected a new folder, an empty one or one of an'):
        DEMO['run'](configs, tmp_path / 'demo', 0, Console(file=sys.stderr))
    assert [path for path in (tmp_path / 'demo').rglob('*') if path.is_file()] == [mine]


def test_runs_and_images_of_an_earlier_demo_are_removed_and_nothing_else(tmp_path):
    out = tmp_path / 'demo'
    DEMO['clear'](out)
    for name in ('runs/a/run.json', 'images/a.png', 'report/report.md'):
        (out / name).parent.mkdir(parents=True)
        (out / name).touch()
    DEMO['clear'](out)
    assert sorted(path.name for path in out.iterdir()) == ['.demo', 'report']


@pytest.mark.slow
def test_a_failing_training_shows_the_end_of_its_output(configs, tmp_path):
    cfg = Config.fromfile(configs[1])
    cfg.model.backbone.norm_cfg.type = 'DNB3d'  # which only a map shows to be wrong
    cfg.dump(configs[1])
    with pytest.raises(DEMO['ChildFailed'], match='tiny_dnb.*exit code'):
        DEMO['train'](configs, tmp_path / 'demo', 0, Console(file=sys.stderr))
