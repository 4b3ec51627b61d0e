"""The gate before every timing: what is timed computes what the reference does."""

import torch

# Relative errors against float64, in norms, above which nothing is timed. Of the detector,
# whose 76 layers amplify rounding, twice what the reference is off is allowed if that is more.
LAYER_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
DETECTOR_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}
# Of the detector's gradient in float32: where maps have few values, rounding alone moves it by
# 0.002 (64 px, batch 3), and each layer's own backward has LAYER_TOLERANCE.
DETECTOR_GRADIENT_TOLERANCE = 1e-2


class ParityError(AssertionError):
    """A norm that is to be timed does not compute what the reference does."""


def relative_error(actual, wanted) -> float:
    """The norm of the difference, relative to the norm of what was wanted."""
    actual, wanted = actual.detach().double(), wanted.detach().double()
    return ((actual - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def check(name, actual, wanted, tolerance, where) -> None:
    """Raises ParityError where a result is further off than the tolerance, or not finite."""
    error = relative_error(actual, wanted)
    if not error <= tolerance:
        raise ParityError(
            f'{where}: {name} differs from the reference by {error:.2g} of its '
            f'norm (allowed {tolerance:.2g}); nothing is timed'
        )


def check_all(actual: dict, wanted: dict, tolerances: dict, where) -> None:
    """`check` of each result for which there is a tolerance, by its name."""
    for name, tolerance in tolerances.items():
        check(name, actual[name], wanted[name], tolerance, where)
