"""What the README claims in code and in numbers holds."""
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import awake

from dn_mmdet import DNB

ROOT = Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()


def test_equivalent_to_is_dn_b(close):
    section = README.split('## Equivalent to')[1]
    lines = re.match(r'\s*\n((?:    .+\n)+)', section).group(1)
    code = '\n'.join(line[4:] for line in lines.splitlines())
    assert len(code.splitlines()) == 3
    for training in (True, False):
        layer = awake(DNB(6)).double().train(training)
        x = torch.randn(3, 6, 5, 4, dtype=torch.float64) * 3 + 1
        names = dict(torch=torch, F=F, x=x, eps=layer.eps, training=training,
                     weight=layer.weight, bias=layer.bias,
                     running_mean=layer.running_mean.clone(),
                     running_var=layer.running_var.clone(), w_in=layer.sc.w_in,
                     b_in=layer.sc.b_in[:, None], w_out=layer.sc.w_out,
                     b_out=layer.sc.b_out[:, None])
        exec(code, names)
        close(names['y'], layer(x))


def test_every_file_that_it_names_exists():
    for path in re.findall(r'\]\(([^)#]+)\)', README):
        assert path.startswith('http') or (ROOT / path).exists(), path
    configs = {path.stem for path in (ROOT / 'configs').glob('*.py')}
    for name in re.findall(r'`(\w+(?:\{[^}]+\}\w+)?)\.py`', README):
        before, options, after = re.fullmatch(r'(\w*?)(?:\{(.+)\})?(\w*)', name).groups()
        for option in (options or '').split(','):
            assert f'{before}{option}{after}' in configs, name


def test_makes_all_targets_that_it_names():
    makefile = (ROOT / 'Makefile').read_text()
    for target in re.findall(r'\bmake ([a-z-]+)', README):
        assert re.search(rf'^{target}:', makefile, re.M), target
