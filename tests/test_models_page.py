"""docs/models.md: its code runs."""

import re
from pathlib import Path

from mmengine.config import Config

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / 'docs' / 'models.md').read_text()


def test_the_code_runs_and_gives_dnb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names := {})
    assert Config.fromfile('retinanet_dnb.py').model.backbone.norm_cfg.type == 'DNB'
    model = names['model']
    assert type(model.bn1).__name__ == 'DNB'
    assert type(model.layer1[0].bn1).__name__ == 'BatchNorm2d'
