"""What a ``type`` in a config means: a name, a name with a scope, a dotted path or a class."""

import inspect
import sys

from mmengine.registry import Registry


def resolve(registry: Registry, kind):
    """The class that a config's ``type`` stands for, or None where there is none.

    It is looked up as mmengine builds it: in the default scope of the config where one
    is set, else in ``registry``. A class, as python-style configs have it, is itself.
    """
    if not isinstance(kind, str):
        return kind if inspect.isclass(kind) else None
    with registry.switch_scope_and_registry(None) as scoped:
        try:
            return scoped.get(kind)
        except RuntimeError:  # how mmengine says that a scope or a module has no such name
            return None


def is_of(registry: Registry, node, classes) -> bool:
    """Whether a dict of a config builds one of ``classes`` or of their subclasses."""
    cls = resolve(registry, node.get('type')) if isinstance(node, dict) else None
    return inspect.isclass(cls) and issubclass(cls, classes)


def loaded(registry: Registry, name: str):
    """The class of a name as `resolve` would find it, or None; nothing is imported for it.

    For names out of files that anybody may have written.
    """
    scope, _, key = name.rpartition('.')
    with registry.switch_scope_and_registry(None) as scoped:
        while scoped is not None:
            if scope in ('', scoped.scope) and key in scoped.module_dict:
                return scoped.module_dict[key]
            scoped = scoped.parent
    return getattr(sys.modules.get(scope), key, None)


def name_of(kind) -> str:
    """How messages call a ``type``."""
    return kind.__name__ if inspect.isclass(kind) else str(kind)
