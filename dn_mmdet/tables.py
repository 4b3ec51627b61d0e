"""Tables: CSV files whose columns are known, and Markdown."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .messages import ConfigError


def check_columns(path: str | Path, *allowed: Sequence[str]) -> None:
    """Raises ConfigError where a file exists and its columns are none of the allowed ones.

    Args:
        allowed: the columns, in one or several versions. The message names the first.
    """
    if not Path(path).exists():
        return
    with open(path, newline='') as file:
        found = next(csv.reader(file), [])
    if found not in [list(columns) for columns in allowed]:
        raise ConfigError(
            f'{path}: expected the columns {", ".join(allowed[0])}, found '
            f'{", ".join(found) or "none"}; name another file'
        )


def read_table(
    path: str | Path,
    allowed: Sequence[Sequence[str]],
    numbers: Mapping[str, type],
    *,
    empty: Any = None,
    unfinished: bool = False,
) -> list[dict]:
    """Rows of a CSV file, its numbers as numbers.

    Args:
        allowed: as in `check_columns`.
        numbers: the type of each column that holds numbers.
        empty: what stands for an empty cell.
        unfinished: whether a last line without its end, which a killed process can leave,
            is left out.

    Raises:
        ConfigError: it has other columns, or a text where a number should be.
        FileNotFoundError: there is no such file.
    """
    check_columns(path, *allowed)
    with open(path, newline='') as file:
        lines = [line for line in file if line.endswith('\n') or not unfinished]
    rows = []
    for row in csv.DictReader(lines, restval=''):
        for name, value in row.items():
            try:
                row[name] = empty if value == '' else numbers.get(name, str)(value)
            except ValueError as error:
                raise ConfigError(f'{path}: {name}: expected a number, got {value!r}') from error
        rows.append(row)
    return rows


def csv_text(rows: Iterable[Mapping], columns: Iterable[str]) -> str:
    """Rows as the text of a CSV file; what they hold beside the columns is left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def append_rows(path: str | Path, rows: Iterable[Mapping], columns: Sequence[str]) -> None:
    """Rows at the end of a CSV file, with a header where it is new.

    Raises:
        ConfigError: the file has other columns.
        ValueError: a row has something beside the columns.
    """
    path = Path(path)
    check_columns(path, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()  # all of it, before anything is written
    writer = csv.DictWriter(text, columns, restval='', lineterminator='\n')
    if not path.exists():
        writer.writeheader()
    elif not path.read_bytes().endswith(b'\n'):
        text.write('\n')
    writer.writerows(rows)
    with open(path, 'a', newline='') as file:
        file.write(text.getvalue())


def markdown_table(header, rows) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [header, ['---', *['--:'] * (len(header) - 1)], *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines)
