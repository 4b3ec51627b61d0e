"""Guards DN layers against code that folds them by reading a BatchNorm's attributes.

A DN layer shows the attributes of its inner norm, because much code reads them from a norm. Code
that computes a convolution's weights from them would succeed and lose SC, without a word. The code
that reads is known by its names: what it is called, and what it calls and reads.
"""

import dis
import inspect
import re
import warnings
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F

# How functions are called that fold a BatchNorm into a convolution or a linear: those of
# torch, timm, mmpretrain and the YOLOs, and what others would call theirs.
FOLDING = re.compile(
    '(^|_)(fus(e|ing|ion)|fold|merge|absorb|re_?param|deploy)'
    '|Fus(e|ing|ion)|Fold|Merge|Absorb|Re_?[Pp]aram|Deploy'
)
# By which of these the code of such functions, whatever they are called, takes the root of the
# variance and eps.
ROOTS = {'sqrt', 'rsqrt', 'sqrt_', 'rsqrt_', 'pow', 'pow_', 'float_power', 0.5, -0.5}


def refuse_to_be_folded(layer: Any, frame: FrameType) -> None:
    """Looks whether the code that reads a layer's running variance would fold the layer.

    Says nothing of a layer whose SC does nothing, and of code that only reads.

    Args:
        layer: a DN layer.
        frame: of the code that reads.

    Raises:
        TypeError: its name says that it folds, and what it does looks so. If only one of the
            two does, there is a warning.
    """
    frames = [frame]
    while _is_part_of_a_function(frame.f_code) and frame.f_back:
        frame = frame.f_back
        frames.append(frame)
    name = frame.f_code.co_name
    named = FOLDING.search(name) and any(map(_reads_more, frames))
    computes = any(map(_computes_batch_norm, frames))
    folds = computes or any(map(_seems_to_fold, frames))
    is_sure = named and (folds or any(map(_could_fold, frames)))
    if not (named or folds) or layer.sc.is_identity():
        return
    kind = type(layer).__name__
    remedy = (
        'turn the layers into BatchNorms first, with dn_mmdet.fold.fold_norm, or do not '
        'fold this one. Code that only reads the norm can use the inner BatchNorm, .bn'
    )
    if is_sure:
        raise TypeError(
            f'{name}: expected a BatchNorm to fold, got {kind}. Its scale and shift '
            f'follow the input and would be lost: {remedy}'
        )
    what = 'compute' if computes else 'fold'
    warnings.warn(
        f'{name} seems to {what} a BatchNorm from its attributes. With a {kind}, the '
        f'scale and shift that follow the input would be lost: {remedy}',
        stacklevel=3,
    )


def _is_part_of_a_function(code):
    """Whether code is that of a lambda or a comprehension; a cell of a notebook is neither."""
    return code.co_name.startswith('<') and bool(code.co_flags & inspect.CO_OPTIMIZED)


def _reads_more(frame):
    """Whether code also reads what folding needs beside the running variance."""
    names = _names(frame)
    return not {'eps', 'running_mean'}.isdisjoint(names) or (
        'weight' in names and not names.isdisjoint(ROOTS)
    )


def _could_fold(frame):
    """Whether code whose name says that it folds does more than to read or to average.

    It takes a root, or passes the statistics on together with eps.
    """
    names = _names(frame)
    return not names.isdisjoint(ROOTS) or {'running_mean', 'eps'} <= names


def _names(frame):
    called, constants = _words(frame.f_code)
    return called | constants


def _seems_to_fold(frame):
    """Whether code that reads a norm's attributes seems to fold the norm.

    It does if it takes the square root of variance and eps, or passes both to a function
    that folds. Code that uses ``sc`` computes the whole layer and does not fold. In a module
    or a cell of a notebook, only the line that reads counts: the others may be about anything.
    """
    code = frame.f_code
    is_function = code.co_flags & inspect.CO_OPTIMIZED
    called, constants = _words(code, None if is_function else frame.f_lineno)
    names = called | constants
    return (
        {'running_var', 'eps'} <= names
        and 'sc' not in names
        and (not names.isdisjoint(ROOTS) or any(map(FOLDING.search, called)))
    )


def _words(code, line=None):
    """The names and the constants in code, and in its lambdas and comprehensions; of one line."""
    if line is None:
        called, constants = {*code.co_names, *code.co_freevars}, {*code.co_consts}
    else:
        found = [each for each in _instructions(code) if each[0] == line]
        named = {*dis.hasname, *dis.hasfree}
        called = {each.argval for _, each in found if each.opcode in named}
        constants = {each.argval for _, each in found if each.opcode in dis.hasconst}
    for group in [each for each in constants if isinstance(each, (tuple, frozenset))]:
        constants |= {*group}
    for inner in [each for each in constants if isinstance(each, CodeType)]:
        if _is_part_of_a_function(inner):
            more_called, more_constants = _words(inner)
            called |= more_called
            constants |= more_constants
    return called, constants


def _instructions(code):
    """(line, instruction) for each instruction."""
    starts, line = dict(dis.findlinestarts(code)), None
    for instruction in dis.get_instructions(code):
        line = starts.get(instruction.offset, line)
        yield line, instruction


def _computes_batch_norm(frame):
    """Whether code that reads a norm's attributes calls torch's function ``batch_norm``."""
    if 'batch_norm' not in frame.f_code.co_names:
        return False
    scope, before = {**frame.f_globals, **frame.f_locals}, None
    for _, instruction in _instructions(frame.f_code):
        name = instruction.argval
        if name == 'batch_norm':
            owner, itself = scope.get(before), scope.get(name)
            if before == 'functional' or any(owner is module for module in (F, torch)):
                return True
            if any(itself is function for function in (F.batch_norm, torch.batch_norm)):
                return True
        before = name if isinstance(name, str) else None
    return False
