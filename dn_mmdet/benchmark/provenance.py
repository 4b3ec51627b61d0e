"""Where figures come from: date, commit, device and versions, for every row."""

import datetime
import os

import torch

from ..provenance import DISTRIBUTIONS, commit_of, cpu_name, version_of
from .variants import Setting


def provenance(setting: Setting, commit: str | None = None) -> dict:
    """What every row says of where its figures come from.

    Args:
        commit: of this code, for a copy of it that is no git checkout.
    """
    device = (
        torch.cuda.get_device_name()
        if setting.device == 'cuda'
        else f'{cpu_name()}, {os.cpu_count()} cores'
    )
    return dict(
        date=datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%d %H:%M'),
        commit=commit or commit_of(),
        device=device,
        threads=torch.get_num_threads(),
        **{name: version_of(name) for name in DISTRIBUTIONS},
        dtype=setting.dtype_name,
        memory_format=setting.layout,
    )
