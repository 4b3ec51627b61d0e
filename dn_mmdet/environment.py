"""What has to be installed around this package, and what to run where it is not.

The tested versions stand in requirements/; the README tells the two stacks apart.
"""
import importlib.metadata


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
                f"`pip install -e '.[openmmlab]'`, then MMCV as the README says") from None


def check_mmdet() -> None:
    """Raises one ImportError with the command to run where mmdet or MMCV's operators are missing.

    MMCV builds without its operators, and without a word, where torch was not
    there to build against; pip also reuses a wheel built against another torch.
    """
    try:
        importlib.import_module('mmcv.ops')
    except (ImportError, OSError, RuntimeError) as error:  # absent, or of another torch
        raise ImportError(
            f"MMCV's compiled operators cannot be imported ({error}). Build them against the "
            f'torch that is installed: `pip cache remove "*mmcv*"; pip install --force-reinstall '
            f'--no-deps --no-build-isolation {_mmcv_requirement()}`') from None
    try:
        importlib.import_module('mmdet')
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        # mmdet asserts its MMCV versions; torchvision needs the torch it was built for
        raise ImportError(
            f"MMDetection cannot be imported ({error}). Install it: `pip install -e '.[onedl]'` "
            f"or `pip install -e '.[openmmlab]'`") from None


def _mmcv_requirement():
    """The MMCV of the stack that is installed here."""
    try:
        importlib.metadata.version('mmengine')
        return 'mmcv==2.1.0'
    except importlib.metadata.PackageNotFoundError:
        return 'onedl-mmcv==2.3.6'
