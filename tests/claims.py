"""The table "What works with DN-B" of docs/tested.md, made of the tests that show it.

python tests/claims.py    # writes it again
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / 'docs' / 'tested.md'
BEGIN, END = '<!-- written by tests/claims.py -->', '<!-- end -->'


def claims() -> dict[str, list[str]]:
    """{what works: [file::test, ...]}, by ``@pytest.mark.shows(what works)``."""
    found = defaultdict(list)
    for path in sorted(TESTS.glob('test_*.py')):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, 'decorator_list', ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == 'pytest.mark.shows':
                    found[ast.literal_eval(mark.args[0])].append(f'{path.name}::{node.name}')
    return found


def table() -> str:
    found = claims()
    rows = [
        f'| {what} | {", ".join(f"`{test}`" for test in found[what])} |'
        for what in sorted(found, key=lambda what: what.strip('`').lower())
    ]
    return '\n'.join(('| what | shown by, in `tests/` |', '|---|---|', *rows))


def with_table(page: str) -> str:
    """A page with the table written again between its two marks."""
    before, after = re.split(f'(?s){BEGIN}.*?{END}', page)
    return f'{before}{BEGIN}\n{table()}\n{END}{after}'


if __name__ == '__main__':
    PAGE.write_text(with_table(PAGE.read_text()))
