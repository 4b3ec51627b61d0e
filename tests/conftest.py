"""What all tests share: one table of tolerances, seeds, one thread, an awake SC."""

import pytest
import torch
from torch import nn

from dn_mmdet import SC

torch.set_num_threads(1)  # two workers on two cores
# pytest says which values an `assert` compared in test_*.py, and elsewhere only where asked to.
pytest.register_assert_rewrite('host_cases')

# The error allowed when a result is compared with a float64 reference. float64:
# rounding in another order; the others: a few units in the last place of what the
# result is stored in. One table, so that no test can be loosened on its own.
TOLERANCE = {
    torch.float64: dict(rtol=1e-10, atol=1e-10),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
    torch.float16: dict(rtol=2e-3, atol=2e-3),
    torch.bfloat16: dict(rtol=1.6e-2, atol=1.6e-2),
}


@pytest.fixture
def close():
    """Asserts that two tensors of one dtype agree within that dtype's tolerance."""

    def assert_close(actual, expected, dtype=None):
        torch.testing.assert_close(
            actual, expected, **TOLERANCE[dtype or torch.as_tensor(actual).dtype]
        )

    return assert_close


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def awake(module, std=0.5):
    """The module with every SC in it away from identity, as after training.

    A fresh SC gives g = h = 0 whatever its input, so a test that leaves it fresh
    cannot tell Dynamic Normalization from BatchNorm.
    """
    for child in module.modules():
        if isinstance(child, SC):
            for parameter in child.parameters():
                nn.init.normal_(parameter, std=std)
    return module
