"""torch's own inputs for the tests of its BatchNorms, given to DN layers at identity.

    python tests/torch_suite.py

The package of torch holds no tests, but what they are made of: for each module its
arguments, inputs and the inputs that it refuses, and samples for `batch_norm`. With g = h = 0
a DN layer has to give what BatchNorm gives of each of them. Prints how many agree, by check,
and each that does not; exit 1 if there is one. In a process of its own, for torch's modules for
tests change global settings when they are imported.
"""

import copy
import pickle
import re
import sys
import types
import unittest
import warnings
from collections import Counter

import torch
from parity import FEW
from torch import nn

from dn_mmdet import DNB, DNC, DNB1d, DNB3d, DNC1d, DNC3d

LAYERS = {
    nn.BatchNorm1d: (DNB1d, DNC1d),
    nn.BatchNorm2d: (DNB, DNC),
    nn.BatchNorm3d: (DNB3d, DNC3d),
}
BACKENDS = ('auto', 'torch', 'reference')
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def torchs():
    """The ModuleInfos of the BatchNorms and the OpInfo of `batch_norm`."""
    sys.modules.setdefault('expecttest', types.ModuleType('expecttest'))  # of no use here
    sys.modules['expecttest'].TestCase = unittest.TestCase
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    modules = [info for info in module_db if info.module_cls in LAYERS]
    return modules, next(op for op in op_db if op.name == 'nn.functional.batch_norm')


def twin(cls, bn, backend, dtype):
    """A DN layer at identity around a copy of bn."""
    layer = cls(bn.num_features, backend=backend, dtype=dtype)
    layer.bn = copy.deepcopy(bn)
    return layer.train(bn.training)


def all_of(module, x, dy):
    """Output, gradients and buffers of a step, in float64."""
    x = x.detach().clone().requires_grad_()
    bn = getattr(module, 'bn', module)
    y = module(x)
    y.backward(dy)
    tensors = [y, x.grad, *(p.grad for p in bn.parameters()), *bn.buffers()]
    return [t.detach().double() for t in tensors]


def output(module, x, dy):
    with torch.no_grad():
        return [module(x).double()]


def as_accurate(of, layer, bn, x):
    """What a layer gives is off by at most twice as much as what BatchNorm gives, in norms.

    Or by a few units in the last place of it, or of the map that was summed up.
    """
    dy = torch.randn_like(x)
    exact = of(copy.deepcopy(bn).double(), x.double(), dy.double())
    for value, by_bn, wanted in zip(
        of(layer, x, dy), of(copy.deepcopy(bn), x, dy), exact, strict=True
    ):
        allowed = FEW * torch.finfo(x.dtype).eps * max(1, wanted.norm(), x.double().norm())
        error, by_bn = (value - wanted).norm(), (by_bn - wanted).norm()
        assert error <= max(2 * by_bn, allowed), f'off by {error:.3g}, BatchNorm by {by_bn:.3g}'


def forward_and_backward(cls, bn, x, backend):
    as_accurate(all_of, twin(cls, bn, backend, x.dtype), bn, x)


def without_gradients(cls, bn, x, backend):
    as_accurate(output, twin(cls, bn, backend, x.dtype), bn, x)


def other_strides(cls, bn, x, backend):
    transposed = x.mT.contiguous().mT if x.dim() > 2 else x.t().contiguous().t()
    forward_and_backward(cls, bn, transposed, backend)
    if x.dim() == 4:
        forward_and_backward(cls, bn, x.contiguous(memory_format=torch.channels_last), backend)


def gradients(cls, bn, x, backend):
    layer = twin(cls, bn, backend, x.dtype)
    layer.bn.momentum = 0.0  # each call is to be the same
    x = x.detach()[:, :, :2].requires_grad_() if x.dim() > 2 else x.detach().requires_grad_()
    torch.autograd.gradcheck(layer, x, fast_mode=True)
    torch.autograd.gradgradcheck(layer, x, fast_mode=True)


def copies_and_state(cls, bn, x, backend):
    layer = twin(cls, bn, backend, x.dtype)
    y = copy.deepcopy(layer)(x).detach()
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(other(x), y)
    other = twin(
        cls,
        bn.__class__(
            bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats, dtype=x.dtype
        ),
        backend,
        x.dtype,
    )
    assert not other.load_state_dict(copy.deepcopy(bn.state_dict())).missing_keys
    assert torch.equal(other.train(bn.training)(x), y)


CHECKS = (forward_and_backward, without_gradients, other_strides, gradients, copies_and_state)


def check(counts, wrong, what, run, *args):
    try:
        run(*args)
        counts[run.__name__] += 1
    except Exception as error:  # noqa: BLE001  # of any kind: it is what is looked for
        first = (str(error).splitlines() or [''])[0]
        wrong.append(f'{run.__name__}: {what}: {type(error).__name__}: {first}')


def same_error(cls, given, error, backend):
    try:
        cls(*given.constructor_input.args, **given.constructor_input.kwargs, backend=backend)(
            *given.forward_input.args
        )
    except error.error_type as got:
        assert re.search(error.error_regex, str(got)), got
    else:
        raise AssertionError(f'was accepted; expected {error.error_regex}')


def same_sample(cls, sample, backend):
    x, (mean, var, w, b) = sample.input.detach(), sample.args
    bn = nn.BatchNorm1d(
        x.shape[1], eps=sample.kwargs.get('eps', 1e-5), momentum=sample.kwargs.get('momentum', 0.1)
    ).double()
    bn.train(sample.kwargs.get('training', False))
    for name, t in (('weight', w), ('bias', b)):
        setattr(bn, name, None if t is None else nn.Parameter(t.detach().clone()))
    for name, t in (('running_mean', mean), ('running_var', var)):
        setattr(bn, name, None if t is None else t.clone())
    layer = twin(cls, bn, backend, x.dtype)
    if x.dim() > 3:
        bn._check_input_dim, layer.ndims = lambda x: None, ()
    as_accurate(all_of, layer, bn, x)


def main():
    warnings.simplefilter('ignore')
    torch.manual_seed(0)
    torch.set_num_threads(1)
    modules, op = torchs()
    counts, wrong = Counter(), []
    for info in modules:
        for backend in BACKENDS:
            for cls in LAYERS[info.module_cls]:
                check_module(info, cls, backend, counts, wrong)
    for backend in BACKENDS:
        for sample in op.sample_inputs('cpu', torch.float64):
            if sample.input.dim() > 1:  # of one dimension: no module takes it
                for cls in (DNB1d, DNC1d):
                    what = f'{cls.__name__} {backend} {tuple(sample.input.shape)} {sample.kwargs}'
                    check(counts, wrong, what, same_sample, cls, sample, backend)
    for name, count in counts.items():
        print(f'{name}: {count} agree')
    for line in wrong:
        print(line)
    print(f'torch {torch.__version__}: {sum(counts.values())} agree, {len(wrong)} differ')
    return len(wrong) > 0


def check_module(info, cls, backend, counts, wrong):
    for dtype in DTYPES:
        for training in (True, False):
            inputs = info.module_inputs_func(
                info, device='cpu', dtype=dtype, requires_grad=False, training=training
            )
            for given in inputs:
                bn = (
                    info.module_cls(
                        *given.constructor_input.args, **given.constructor_input.kwargs
                    )
                    .to(dtype)
                    .train(training)
                )
                for parameter in bn.parameters():
                    nn.init.uniform_(parameter, 0.5, 2)
                what = f'{cls.__name__} {backend} {dtype} training={training} {given.desc}'
                x = given.forward_input.args[0]
                for run in CHECKS:
                    if run is gradients and (dtype != torch.float64 or x.numel() == 0):
                        continue  # differences need all digits, and values
                    check(counts, wrong, what, run, cls, bn, x, backend)
    for given in info.module_error_inputs_func(
        info, device='cpu', dtype=torch.float32, requires_grad=False, training=True
    ):
        inputs = given.module_error_input
        check(
            counts,
            wrong,
            f'{cls.__name__} {backend} {inputs.constructor_input}',
            same_error,
            cls,
            inputs,
            given,
            backend,
        )


if __name__ == '__main__':
    sys.exit(main())
