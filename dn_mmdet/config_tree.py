"""Configs of MMEngine: the dicts that they are made of, and the modules that they import."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from .renamed import RENAMED


def dicts(node: Any, option: str) -> Iterator[tuple[str, dict]]:
    """Every dict of a config, outer ones first, with the option that sets it.

    One may be changed when it comes: what is inside is looked for afterwards.

    Example:
        >>> list(dicts(dict(a=[dict(b=1)]), 'model'))
        [('model', {'a': [{'b': 1}]}), ('model.a.0', {'b': 1})]
    """
    if isinstance(node, dict):
        yield option, node
        children = list(node.items())
    elif isinstance(node, (list, tuple)):
        children = list(enumerate(node))
    else:
        return
    for key, child in children:
        yield from dicts(child, f'{option}.{key}')


def strings(node: Any, option: str = '') -> Iterator[tuple[str, str]]:
    """Every text in a config, with the option that sets it.

    Example:
        >>> list(strings(dict(a=[dict(b='x')], c=1)))
        [('a.0.b', 'x')]
    """
    if isinstance(node, str):
        yield option, node
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from strings(child, f'{option}.{key}' if option else str(key))
    elif isinstance(node, (list, tuple)):
        for index, child in enumerate(node):
            yield from strings(child, f'{option}.{index}')


def innermost(dataset: dict, option: str) -> Iterator[tuple[str, dict]]:
    """The data sets inside wrappers, which repeat or join others, with the options that set them.

    Example:
        >>> list(innermost(dict(type='RepeatDataset', dataset=dict(type='A')), 'train'))
        [('train.dataset', {'type': 'A'})]
    """
    if isinstance(dataset.get('dataset'), dict):
        yield from innermost(dataset['dataset'], f'{option}.dataset')
    elif dataset.get('datasets'):
        for index, inner in enumerate(dataset['datasets']):
            yield from innermost(inner, f'{option}.datasets.{index}')
    else:
        yield option, dataset


def imports_of(cfg: Config) -> list[str]:
    """The modules that a config imports when it is loaded."""
    listed = (cfg.get('custom_imports') or {}).get('imports') or []
    return [listed] if isinstance(listed, str) else list(listed)


def add_imports(cfg: Config, *modules: str) -> None:
    """Has a config import modules, after those that it imports already."""
    _set_imports(cfg, [*imports_of(cfg), *modules])


def remove_imports(cfg: Config, *modules: str) -> None:
    """Has a config no longer import modules, under whatever name it knows them."""
    _set_imports(cfg, [name for name in imports_of(cfg) if RENAMED.get(name, name) not in modules])


def _set_imports(cfg, names):
    before = cfg.get('custom_imports') or dict(allow_failed_imports=False)
    cfg.custom_imports = dict(before, imports=list(dict.fromkeys(names)))
