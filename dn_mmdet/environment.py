"""What this package needs to be installed, and the command that installs what is missing.

requirements/ has the tested versions. docs/install.md explains the two stacks.
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
                f'dn_mmdet needs {module}, which is not installed here. In a clone of dn_mmdet, '
                f'`make setup` installs everything. In your own environment, install torch and '
                f"torchvision, then run `pip install --no-build-isolation -e '.[onedl]'` "
                f"(maintained forks) or `pip install --no-build-isolation -e '.[openmmlab]'`, "
                f'then install MMCV as in docs/install.md'
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
            f"MMCV's compiled operators cannot be imported ({error}). Compile them for the "
            f'installed torch: `pip cache remove "*mmcv*"; pip install --force-reinstall '
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
            f'MMDetection cannot be imported ({error}). Install it: '
            f"`pip install --no-build-isolation -e '.[onedl]'` or "
            f"`pip install --no-build-isolation -e '.[openmmlab]'`"
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
            f'expected {" and ".join(missing)} to be installed: in a clone of dn_mmdet, run '
            f"`pip install --no-build-isolation -e '.[{extra}]'`"
        )


def _mmcv_requirement():
    """The MMCV of the stack that is installed here."""
    try:
        importlib.metadata.version('mmengine')
        return 'mmcv==2.1.0'
    except importlib.metadata.PackageNotFoundError:
        return 'onedl-mmcv==2.3.6'
