"""Files that are there whole or not at all, whenever the process that writes them ends."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` at the end, if there is no error.

    After an error there is nothing of it. It has the same name, which torch writes into
    checkpoints, in a folder of its own.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.part-') as folder:
        yield Path(folder, path.name)
        os.replace(Path(folder, path.name), path)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, newline='')


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1))


def read_json(path: str | Path, default: Any = None) -> Any:
    """What `write_json` wrote, or the default where it did not yet."""
    path = Path(path)
    return json.loads(path.read_text()) if path.is_file() else default
