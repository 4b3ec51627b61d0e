"""Files and folders that a config names."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import is_remote
from ..messages import ConfigError


def check_exists(option: str, path: str, exists: Callable[[Path], bool], what: str) -> None:
    """Raises ConfigError where a path, unless it is remote, does not exist."""
    if not is_remote(path) and not exists(Path(path)):
        raise ConfigError(
            f'{path}: no such {what} (set by {option}; current folder: '
            f'{Path.cwd()}). Put the data there, or set for instance '
            f'--cfg-options {option}=PATH'
        )


class JsonFiles(dict):
    """The content of json files, each read once."""

    def read(self, option: str, path: str) -> Any:
        """The content of a file, or ConfigError where it cannot be read."""
        key = os.path.realpath(path)
        if key not in self:
            self[key] = _read_json(option, path)
        return self[key]


def _read_json(option, path):
    try:
        with open(path, encoding='utf-8') as file:
            return json.load(file)
    except (ValueError, OSError) as error:  # ValueError: no json, or no text
        raise ConfigError(
            f'{path}: cannot be read as json ({error}); set by {option}. Copy or make it again'
        ) from error
