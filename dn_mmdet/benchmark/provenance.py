"""Where figures come from: date, commit, device and versions, for every row."""
import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from .variants import Setting

ROOT = Path(__file__).parents[2]


def provenance(setting: Setting, commit: str | None = None) -> dict:
    """What every row says of where its figures come from.

    Args:
        commit: of this code, for a copy of it that is no git checkout.
    """
    return dict(date=datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d %H:%M'),
                commit=commit or _commit(), device=_device_name(setting.device),
                threads=torch.get_num_threads(),
                **{name: _version(*names) for name, names in dict(
                    torch=('torch', ), triton=('triton', ),
                    mmengine=('mmengine', 'onedl-mmengine'),
                    mmdet=('mmdet', 'onedl-mmdetection')).items()},
                dtype=str(setting.dtype).removeprefix('torch.'),
                memory_format='channels_last' if setting.channels_last else 'contiguous')


def _commit():
    """The commit of the checkout that this package is in, marked where files differ from it."""
    try:
        git = ['git', '-C', str(ROOT)]
        commit = subprocess.run([*git, 'rev-parse', '--short=12', 'HEAD'], capture_output=True,
                                text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, 'diff', 'HEAD', '--quiet', '--', 'dn_mmdet'],
                                 capture_output=True).returncode
        return commit + ('+changes' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def _version(*names):
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return 'none'


def _device_name(device):
    if device == 'cuda':
        return torch.cuda.get_device_name()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return f'{names[0] if names else platform.processor()}, {os.cpu_count()} cores'
