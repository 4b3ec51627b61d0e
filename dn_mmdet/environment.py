"""What has to be installed around this package, and the command if it is not.

requirements/ has the tested versions; docs/install.md tells the two stacks apart.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import sys
import warnings


def check_mmengine() -> None:
    """Raises one ImportError with the command to run where torch or mmengine is missing."""
    for module in ('torch', 'mmengine'):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise ImportError(
                f'dn_mmdet needs {module}, which is not installed here. In a clone of dn_mmdet '
                f'`make setup` installs everything; into an environment of your own: install '
                f"torch and torchvision, then `pip install -e '.[onedl]'` (maintained forks) or "
                f"`pip install -e '.[openmmlab]'`, then MMCV as docs/install.md says"
            ) from None


def check_mmdet() -> None:
    """Raises one ImportError with the command to run where mmdet or MMCV's operators are missing.

    Where torch was not there to build against, MMCV builds without its operators and
    does not say so. pip also reuses a wheel that was built against another torch.
    """
    try:
        importlib.import_module('mmcv.ops')
    except (ImportError, OSError, RuntimeError) as error:  # absent, or of another torch
        raise ImportError(
            f"MMCV's compiled operators cannot be imported ({error}). Build them against the "
            f'torch that is installed: `pip cache remove "*mmcv*"; pip install --force-reinstall '
            f'--no-deps --no-build-isolation {_mmcv_requirement()}`'
        ) from None
    try:
        with without_notes_on_optional_parts():
            importlib.import_module('mmdet')
            importlib.import_module('mmdet.datasets')
            importlib.import_module('mmdet.evaluation')
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        # mmdet asserts its MMCV versions; torchvision needs the torch it was built for
        raise ImportError(
            f"MMDetection cannot be imported ({error}). Install it: `pip install -e '.[onedl]'` "
            f"or `pip install -e '.[openmmlab]'`"
        ) from None


@contextlib.contextmanager
def without_notes_on_optional_parts():
    """Drops what mmdet and mmpretrain say on import about parts that no config here uses.

    That they have no OneDL data sets is printed; that faster_coco_eval is missing is a
    warning, which reads as if no metric would be computed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'faster_coco_eval is not installed', UserWarning)
            yield
    finally:
        for line in said.getvalue().splitlines(keepends=True):
            if 'Could not import OneDL' not in line:
                sys.stdout.write(line)


def check_extra(extra: str, *modules: str) -> None:
    """Raises one ImportError with the command to run where a module of an extra is missing.

    Args:
        extra: the name of the extra in pyproject.toml.
        modules: the modules that are needed, by the names under which they are imported.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'expected {" and ".join(missing)}, not installed here: in a clone of '
            f"dn_mmdet run `pip install -e '.[{extra}]'`"
        )


def _mmcv_requirement():
    """The MMCV of the stack that is installed here."""
    try:
        importlib.metadata.version('mmengine')
        return 'mmcv==2.1.0'
    except importlib.metadata.PackageNotFoundError:
        return 'onedl-mmcv==2.3.6'
