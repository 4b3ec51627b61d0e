"""Which module may import which: from a tool down to the maths, never back."""

import ast
import inspect
from pathlib import Path

import pytest

from dn_mmdet.kernels import Backend

PACKAGE = Path(__file__).parents[1] / 'dn_mmdet'
# What each room may know beside itself and what lies at the top, which knows none of them.
ROOMS = {
    'kernels': set(),
    'models': set(),
    'datasets': set(),
    'checks': set(),
    'cli': {'checks'},
    'benchmark': {'kernels'},
    'experiments': {'checks', 'cli', 'kernels'},
    'deploy': {'checks', 'cli', 'experiments'},
    'zoo': {'models'},
}
# The core runs the backends of kernels/, and these read its modules.
CORE = {name: {'kernels'} for name in ('functional', 'inner_norm', 'layers')}


def imported(path):
    """The modules of this package that a file imports, as ('checks', 'coco')."""
    here = path.relative_to(PACKAGE).with_suffix('').parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (*here[: -node.level], *(node.module or '').split('.'))
        elif isinstance(node, ast.ImportFrom) and node.module.split('.')[0] == 'dn_mmdet':
            module = (*node.module.split('.')[1:],)
        else:
            continue
        module = tuple(filter(None, module))
        if PACKAGE.joinpath(*module).is_dir():  # `from ..checks import preflight`
            yield from ((*module, alias.name) for alias in node.names)
        else:
            yield module


def test_every_room_is_listed():
    assert ROOMS.keys() == {path.parent.name for path in PACKAGE.glob('*/__init__.py')}


@pytest.mark.parametrize('name', ['torch_ops', 'cpp_ops', 'triton_ops'])
def test_every_backend_has_the_functions_of_the_protocol(name):
    backend = pytest.importorskip(f'dn_mmdet.kernels.{name}', exc_type=ImportError)
    assert inspect.isclass(backend.Coefficients)
    for function in ('moments', 'affine', 'reduce', 'input_gradient'):
        wanted = inspect.signature(getattr(Backend, function)).parameters.values()
        found = inspect.signature(getattr(backend, function)).parameters.values()
        assert [p.name for p in found] == [p.name for p in wanted][1:]  # but self


@pytest.mark.parametrize(
    'path', sorted(PACKAGE.rglob('*.py')), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_a_module_knows_only_the_rooms_below_it(path):
    room, *inner = path.relative_to(PACKAGE).with_suffix('').parts
    allowed = {room, *ROOMS[room]} if inner else CORE.get(room, set())
    found = {module[0] for module in imported(path) if len(module) > 1}
    assert found & ROOMS.keys() <= allowed
