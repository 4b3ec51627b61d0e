"""The package installs from a wheel and from an sdist, and works without a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dn_mmdet import environment
from dn_mmdet.version import __version__

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip('tomllib', reason='Python 3.10 has no tomllib')
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
# What the extras and the frameworks bring: the layers need none of it.
OPTIONAL = (
    'mmcv',
    'mmdet',
    'mmpretrain',
    'onnx',
    'onnxruntime',
    'onnxscript',
    'plotly',
    'pycocotools',
    'scipy',
    'sklearn',
    'timm',
    'torchvision',
)
USE = f"""
import sys
for name in {OPTIONAL}:
    sys.modules[name] = None  # an import of it fails
import torch
import dn_mmdet
from dn_mmdet.convert import convert_norm
from dn_mmdet.kernels import cpp_ops
x = torch.randn(2, 4, 3, 3, requires_grad=True)
bn = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
expected = bn(x).detach()
assert torch.allclose(convert_norm(bn)(x), expected, atol=1e-6)
layer = dn_mmdet.DNB(4, backend='cpp')
torch.nn.init.normal_(layer.sc.w_out)
reference = dn_mmdet.DNB(4, backend='reference')
reference.load_state_dict(layer.state_dict())
assert torch.allclose(layer(x), reference(x), atol=1e-5)
layer(x).sum().backward()
print(dn_mmdet.__file__, dn_mmdet.__version__)
"""


def run(*command, cwd):
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def build(source, out):
    run(
        sys.executable,
        '-m',
        'pip',
        'wheel',
        source,
        '--no-deps',
        '--no-build-isolation',
        '--disable-pip-version-check',
        '-w',
        out,
        cwd=out.parent,
    )
    (wheel,) = out.glob('*.whl')
    return wheel


def contents(wheel):
    """The files of a wheel but its list of hashes."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith('RECORD')}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what git tracks or would track, so that nothing is built into the real one."""
    names = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split('\0')
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (tmp_path / 'checkout' / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / 'checkout' / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path / 'checkout'


@pytest.mark.slow
def test_wheel_and_sdist_work_outside_of_a_checkout(checkout, tmp_path):
    (tmp_path / 'wheel').mkdir()
    wheel = build(checkout, tmp_path / 'wheel')
    assert wheel.name.startswith(f'dn_mmdet-{__version__}-')
    files = contents(wheel)
    assert {'dn_mmdet/py.typed', 'dn_mmdet/benchmark/__init__.py'} <= files
    assert not any(name.startswith(('tests/', 'tools/', 'configs/')) for name in files)

    target = tmp_path / 'installed'
    run(
        sys.executable,
        '-m',
        'pip',
        'install',
        wheel,
        '--no-deps',
        '--target',
        target,
        '--disable-pip-version-check',
        cwd=tmp_path,
    )
    code = f'import sys; sys.path.insert(0, {str(target)!r})\n{USE}'
    where, version = (
        run(sys.executable, '-W', 'error', '-c', code, cwd=tmp_path).splitlines()[-1].split()
    )
    assert Path(where).is_relative_to(target) and version == __version__

    make = 'from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])'
    (tmp_path / 'sdist').mkdir()
    run(sys.executable, '-c', f'import sys; {make}', tmp_path / 'sdist', cwd=checkout)
    (sdist,) = (tmp_path / 'sdist').glob('*.tar.gz')
    (tmp_path / 'again').mkdir()
    assert contents(build(sdist, tmp_path / 'again')) == files  # compiled from its own sources


def test_the_package_itself_asks_for_torch_alone():
    assert PROJECT['dependencies'] == ['torch']


def test_every_extra_is_explained_and_the_set_up_installs_only_those():
    page = (ROOT / 'docs' / 'install.md').read_text()
    for extra in PROJECT['optional-dependencies']:
        assert f'`{extra}`' in page, extra
    script = (ROOT / 'tools' / 'setup_env.sh').read_text()
    asked = script.split('-e ".[$stack,')[1].split(']"')[0].split(',')
    assert set(asked) <= set(PROJECT['optional-dependencies'])


def test_a_missing_package_of_an_extra_is_named_with_the_command():
    environment.check_extra('demo', 'json')
    with pytest.raises(ImportError) as error:
        environment.check_extra('demo', 'sklearn_of_nobody', 'json')
    assert str(error.value) == (
        'expected sklearn_of_nobody to be installed: in a clone of dn_mmdet, run '
        "`pip install --no-build-isolation -e '.[demo]'`"
    )
