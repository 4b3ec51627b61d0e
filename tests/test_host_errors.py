"""The compiled GPU host: parts and maps that do not fit, launches and modules that fail."""

import importlib
from types import SimpleNamespace

import host_cases
import pytest
import torch
from host_cases import check, pair, taken, values
from parity import DEVICES, INTERPRETED, assert_interpreted_tests_pass
from torch import nn

from dn_mmdet import DNC
from dn_mmdet.kernels import choice, host

if INTERPRETED:
    import emulated_gpu
    from host_cases import FAKE
pytestmark = host_cases.pytestmark
no_error_of_a_kernel_is_lost = host_cases.no_error_of_a_kernel_is_lost


if not INTERPRETED:

    def test_in_the_interpreter():
        assert_interpreted_tests_pass(__file__, 'not gpu')


def broken_by(**attributes):

    def modify(layer):
        for name, value in attributes.items():
            module, name = name.split('_', 1)
            setattr(getattr(layer, module), name, value)

    return modify


def parameter(*shape, **kwargs):
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64, **kwargs))


ERRORS = {
    'weight of another size': (broken_by(bn_weight=parameter(2)), RuntimeError, 'weight'),
    'bias of another size': (broken_by(bn_bias=parameter(4)), RuntimeError, 'bias'),
    'w_in of another size': (broken_by(sc_w_in=parameter(8, 5)), RuntimeError, 'w_in'),
    'w_in of fewer units': (broken_by(sc_w_in=parameter(7, 6)), RuntimeError, 'b_in'),
    'w_out of another size': (broken_by(sc_w_out=parameter(6, 7)), RuntimeError, 'w_out'),
    'b_out of another size': (broken_by(sc_b_out=parameter(3)), RuntimeError, 'b_out'),
    'running_mean of another size': (
        broken_by(bn_running_mean=torch.zeros(2)),
        RuntimeError,
        'running_mean',
    ),
    'running_var alone': (broken_by(bn_running_mean=None), ValueError, 'running_mean'),
    'weight elsewhere': (
        broken_by(bn_weight=parameter(3, device='meta')),
        RuntimeError,
        'same device',
    ),
    'w_in elsewhere': (
        broken_by(sc_w_in=parameter(8, 6, device='meta')),
        RuntimeError,
        'same device',
    ),
    'averages elsewhere': (
        broken_by(bn_running_mean=torch.zeros(3, device='meta')),
        RuntimeError,
        'same device',
    ),
    'integers': (
        broken_by(bn_running_mean=torch.zeros(3, dtype=torch.int64)),
        RuntimeError,
        'floating',
    ),
    'eps': (broken_by(bn_eps=0.0), ValueError, 'eps'),
    'eps that is no number': (broken_by(bn_eps=float('nan')), ValueError, 'eps'),
}


@DEVICES
@pytest.mark.parametrize('name', ERRORS)
def test_parts_that_do_not_fit(name, device):
    modify, error, match = ERRORS[name]
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2)
    check(layer, twin, x)
    modify(layer)
    for t in (layer.bn._buffers, layer.bn._parameters, layer.sc._parameters):
        for key, value in t.items():
            if value is not None and value.device.type == 'cpu':
                t[key] = value.to(device)
    assert not taken(layer, x)
    with pytest.raises(error, match=match):
        layer(x)


@DEVICES
@pytest.mark.parametrize(
    'x, error, match',
    [
        (torch.zeros(2, 4, 2, 2), ValueError, 'expected 3 channels'),
        (torch.zeros(2, 3, 2), ValueError, 'expected 4D input'),
        (torch.zeros(3), ValueError, 'expected 4D input'),
        (torch.zeros(()), ValueError, 'expected 4D input'),
        (torch.zeros(2, 3, 2, 2, dtype=torch.int32), TypeError, 'floating-point'),
        (torch.zeros(2, 3, 2, 2, dtype=torch.complex64), TypeError, 'floating-point'),
        (torch.zeros(2, 3, 2, 2).to(torch.float8_e4m3fn), ValueError, 'float8'),
        (torch.zeros(1, 3, 1, 1), ValueError, 'more than 1 value per channel'),
    ],
    ids=lambda v: f'{tuple(v.shape)} {v.dtype}' if isinstance(v, torch.Tensor) else '',
)
def test_maps_that_do_not_fit(x, error, match, device):
    layer, _ = pair(device)
    assert not taken(layer, x := x.to(device))
    with pytest.raises(error, match=match):
        layer(x)


@DEVICES
def test_a_map_on_another_device(device):
    layer, _ = pair('meta')
    with pytest.raises(RuntimeError, match='same device'):
        layer(values(device, 2, 3, 2, 2))
    layer, _ = pair(device)
    with pytest.raises((RuntimeError, ValueError), match='device|CUDA'):
        layer(values('meta', 2, 3, 2, 2))


if INTERPRETED:

    @pytest.fixture
    def refusing():
        """Lets the driver answer every launch and every module with an error."""

        def refuse(code):
            FAKE.fake_set_callback(None if code else emulated_gpu.on_launch)
            FAKE.fake_refuse(code)

        yield refuse
        refuse(0)

    def test_a_launch_that_fails(refusing):
        """A clear error, nothing else changed, and the layer works afterwards."""
        layer, twin = pair('cpu')
        x = values('cpu', 2, 3, 2, 2).requires_grad_()
        check(layer, twin, x)
        y = layer(x)
        state = {name: t.clone() for name, t in layer.state_dict().items()}
        refusing(719)
        for call in (lambda: layer(x), lambda: y.sum().backward(retain_graph=True)):
            with pytest.raises(RuntimeError, match=r'^cuLaunchKernel: CUDA error 719 \(the fake'):
                call()
        assert x.grad is None
        for name, t in layer.state_dict().items():
            assert torch.equal(t, state[name]), name
        refusing(0)
        y.sum().backward()
        twin(x)
        check(layer, twin, x)

    @pytest.mark.parametrize('error, by_python', [('driver', False), ('abi', True)])
    def test_kernels_that_cannot_be_loaded(error, by_python, refusing, monkeypatch):
        """One warning, and right values by the slower path."""

        def compiled(signature, capability):
            if error == 'abi':
                raise host.UnknownTriton('another version')
            assert capability == 90
            return SimpleNamespace(
                hash='hash',
                asm=dict(cubin=b''),
                metadata=SimpleNamespace(name='kernel', shared=1 << 16),
            )

        logged = []
        monkeypatch.setattr(host, '_load', emulated_gpu.load_by_driver)
        monkeypatch.setattr(host, '_unusable', {})
        monkeypatch.setattr(host, '_loaded', {})
        monkeypatch.setattr(host, 'compile_kernel', compiled)
        monkeypatch.setattr(host, 'print_log', lambda text, **kwargs: logged.append(text))
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
        assert choice.on_gpu(0) is not None  # nothing is known against it yet
        refusing(209)
        for shape in ((2, 3, 1, 13), (2, 3, 1, 15)):  # nobody else's
            for layer, twin in (pair('cpu'), pair('cpu', DNC)):
                check(layer, twin, values('cpu', *shape), host=False)
        assert len(logged) == 1 and 'slower' in logged[0]
        assert ('another version' if error == 'abi' else 'CUDA error 209') in logged[0]
        assert host.kernels_run_on(0) == by_python and host.kernels_run_on(1)
        assert (choice.on_gpu(0) is not None) == by_python
        refusing(0)
        check(*pair('cpu'), values('cpu', 2, 3, 2, 2))  # those that are there run

    def test_a_gpu_that_is_too_old_for_the_kernels(monkeypatch):
        logged = []
        monkeypatch.setattr(host, '_load', emulated_gpu.load_by_driver)
        monkeypatch.setattr(host, '_unusable', {})
        monkeypatch.setattr(host, '_loaded', {})
        monkeypatch.setattr(host, 'print_log', lambda text, **kwargs: logged.append(text))
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
        layer, twin = pair('cpu')
        check(layer, twin, values('cpu', 2, 3, 1, 19), host=False)  # nobody else's
        assert len(logged) == 1 and 'compute capability 8.0 or later, got 7.5' in logged[0]
        assert choice.on_gpu(0) is None

    def test_a_full_memory_is_no_fault_of_the_gpu(refusing, monkeypatch):
        """It is told as torch tells it, and the next call runs."""
        binary = SimpleNamespace(
            hash='hash',
            asm=dict(cubin=b''),
            metadata=SimpleNamespace(name='kernel', shared=1 << 10),
        )
        monkeypatch.setattr(host, '_load', emulated_gpu.load_by_driver)
        monkeypatch.setattr(host, '_unusable', {})
        monkeypatch.setattr(host, '_loaded', {})
        monkeypatch.setattr(host, 'compile_kernel', lambda *args: binary)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
        layer, twin = pair('cpu')
        x = values('cpu', 2, 3, 1, 17)  # nobody else's
        refusing(2)
        with pytest.raises(torch.OutOfMemoryError, match='no memory left for the kernels'):
            layer(x)
        assert host.kernels_run_on(0)
        refusing(0)
        monkeypatch.setattr(host, '_load', emulated_gpu.load)
        check(layer, twin, x)

    def test_kernels_are_loaded_once(monkeypatch):
        binary = SimpleNamespace(
            hash='some',
            asm=dict(cubin=b'\0'),
            metadata=SimpleNamespace(name='kernel', shared=1 << 16),
        )
        monkeypatch.setattr(host, '_loaded', {})
        monkeypatch.setattr(host, 'compile_kernel', lambda *args: binary)
        monkeypatch.setattr(host.Signature, 'of', lambda plan, launch: 'one kernel')
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
        first, second = (emulated_gpu.load_by_driver(None, None, 0) for _ in range(2))
        assert first == second and first[1] == 1 << 16
        assert emulated_gpu.load_by_driver(None, None, 1) != first  # each GPU its own


def test_a_host_that_was_built_from_other_sources(monkeypatch):
    monkeypatch.setattr(host._host, 'INTERFACE', host.INTERFACE - 1)
    with pytest.raises(ImportError, match='was built from other sources of this package'):
        importlib.reload(host)


def test_another_way_to_pass_arguments_is_noticed():
    known = dict(
        num_ctas=1,
        launch_cooperative_grid=False,
        launch_pdl=False,
        global_scratch_size=0,
        profile_scratch_size=0,
    )
    ptx = '.visible .entry k(.param .u64 .ptr .global k_0, .param .u32 k_1, {}) .reqntid 128'
    pair_ = '.param .u64 k_2, .param .u64 k_3'
    for extra, changed in (
        ('.param .u64 k_2', {}),
        (pair_ + ', .param .u64 k_4', {}),
        (pair_, dict(num_ctas=2)),
        (pair_, dict(launch_pdl=True)),
        (pair_, dict(launch_pdl=None)),  # it has another name
        (pair_, dict(global_scratch_size=4)),
    ):
        given = {name: v for name, v in dict(known, **changed).items() if v is not None}
        binary = SimpleNamespace(
            metadata=SimpleNamespace(**given), asm=dict(ptx=ptx.format(extra))
        )
        with pytest.raises(host.UnknownTriton, match='this version of Triton is not known'):
            host._check_arguments(binary, ['*fp32', 'i32'])
    binary = SimpleNamespace(metadata=SimpleNamespace(**known), asm=dict(ptx=ptx.format(pair_)))
    host._check_arguments(binary, ['*fp32', 'i32'])
