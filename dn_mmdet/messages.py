"""Parts of the tools' messages: an error class, suggestions, short lists."""

import difflib
import logging
import re

from mmengine.logging import print_log


class UserError(ValueError):
    """An error that the user can correct. A tool reports it in one message."""

    exit_code = 2  # of the tool


class ConfigError(UserError):
    """A config, an option or a folder is wrong, and the tool cannot go on."""


def did_you_mean(wrong, names) -> str:
    """The end of a message about a name that does not exist: similar names, and all names."""
    lower = {name.lower(): name for name in names}
    plain = re.sub(r'[^a-z0-9]|2d$', '', str(wrong).lower().rpartition('.')[2])
    swapped = [name for name in lower if sorted(name) == sorted(plain)]  # DBN
    close = swapped or difflib.get_close_matches(plain, lower, n=2, cutoff=0.5)
    meant = ' or '.join(repr(lower[name]) for name in close)
    hint = f'; did you mean {meant}?' if meant else '.'
    return f'{hint} There are: {", ".join(names)}'


def some(names) -> str:
    """The first names of a list, as text."""
    names = [str(name) for name in names]
    return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')


def reason(error) -> str:
    """The message of an exception, without the quotes of a KeyError; its type without one."""
    return str(error.args[0] if len(error.args) == 1 else error) or type(error).__name__


def wants_larger_batch(error) -> bool:
    """Whether an error is BatchNorm's own, of a batch with one value for a channel."""
    return 'more than 1 value per channel' in str(error)


def tell(text) -> None:
    """Logs a warning: something that the user should know, but that does not stop the tool."""
    print_log(text, logger='current', level=logging.WARNING)
