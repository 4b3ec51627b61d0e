"""Where figures come from: the commit of this code, the device, the versions of packages."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]  # of the checkout, where this is one
# Under each name, the distributions that may provide it.
DISTRIBUTIONS = dict(
    torch=('torch',),
    triton=('triton',),
    mmengine=('mmengine', 'onedl-mmengine'),
    mmdet=('mmdet', 'onedl-mmdetection'),
)


def commit_of(root: Path = ROOT) -> str:
    """The commit that the code is at, with '+' where its files differ from it.

    'unknown' where ``root`` is no checkout of its own, as in an environment inside another one.
    """

    def git(*arguments):
        return subprocess.run(
            ['git', '-C', str(root), *arguments], check=True, text=True, capture_output=True
        ).stdout.strip()

    try:
        if Path(git('rev-parse', '--show-toplevel')).resolve() != Path(root).resolve():
            return 'unknown'
        parts = 'dn_mmdet', 'tools', 'configs'
        changed = git('status', '--porcelain', '--untracked-files=no', '--', *parts)
        return git('rev-parse', '--short=10', 'HEAD') + ('+' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def cpu_name() -> str:
    """The model of the processor."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def hardware() -> str:
    """The GPU's name, or the CPU's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU {cpu_name()}'


def version_of(name: str) -> str:
    """Of a package of `DISTRIBUTIONS`; 'none' where it is not installed."""
    for distribution in DISTRIBUTIONS[name]:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return 'none'
