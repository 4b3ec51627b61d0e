"""The compiled GPU host: its plans of launches, what it keeps and frees, threads."""

import gc
import struct
import sys
import threading
import weakref

import host_cases
import pytest
import torch
from host_cases import check, pair, values
from parity import DEVICES, INTERPRETED, assert_interpreted_tests_pass

from dn_mmdet import DNB, DNC
from dn_mmdet.kernels import _host, host

pytestmark = host_cases.pytestmark
no_error_of_a_kernel_is_lost = host_cases.no_error_of_a_kernel_is_lost


if not INTERPRETED:

    def test_in_the_interpreter():
        assert_interpreted_tests_pass(__file__, 'not gpu')


@DEVICES
def test_more_than_one_shape_and_mode(device):
    layer, twin = pair(device)
    for shape in ((2, 3, 2, 2), (3, 3, 2, 2), (2, 3, 3, 1), (2, 3, 2, 2)):
        check(layer, twin, values(device, *shape))
        check(layer.eval(), twin.eval(), values(device, *shape))
        layer.train(), twin.train()


@DEVICES
def test_more_plans_than_are_kept(device):
    layer, twin = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    dy = torch.randn_like(x)
    y, expected = layer(x), twin(x)
    for i in range(1 << 14):
        _host.add_plan((1000, i, *range(7)), struct.pack('<16q', *[0] * 16))
    for actual, wanted in zip(
        torch.autograd.grad(y, [x, *layer.parameters()], dy),
        torch.autograd.grad(expected, [x, *twin.parameters()], dy),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)
    check(layer, twin, x)


@pytest.mark.parametrize(
    'blob', [b'', struct.pack('<15q', *[0] * 15), struct.pack('<17q', *[0] * 17)]
)
def test_a_plan_that_is_cut_off(blob):
    with pytest.raises(RuntimeError, match='plan too'):
        _host.add_plan((1000, *range(8)), blob)


@DEVICES
@pytest.mark.parametrize('dense', [True, False])
def test_a_step_leaves_nothing_behind(dense, device):
    gc.collect()
    gc.disable()  # nothing waits for it
    try:
        layer, _ = pair(device)
        x = values(device, 2, 3, 4, 2).requires_grad_()
        map_ = x * 1
        y = layer(map_ if dense else map_[:, :, ::2])
        node, saved = y.grad_fn, weakref.ref(map_)
        y.backward(torch.ones_like(y))
        del map_
        assert saved() is None
        things = [weakref.ref(t) for t in (x, y, layer, *layer.parameters(), *layer.buffers())]
        del x, y, layer, node
        assert not any(thing() is not None for thing in things)
    finally:
        gc.enable()


@DEVICES
def test_a_graph_without_a_backward_pass_is_freed(device):
    layer, _ = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    map_ = x * 1
    y = layer(map_)
    gone = weakref.ref(map_)
    del map_
    assert gone() is not None  # saved
    del y
    assert gone() is None


@DEVICES
def test_references_do_not_pile_up(device):
    layer, _ = pair(device)
    x = values(device, 2, 3, 2, 2).requires_grad_()
    objects = [layer.bn, layer.sc, layer.bn.weight, layer.bn._parameters, x]
    layer(x).sum().backward()
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(5):
        y = layer(x)
        torch.autograd.grad(y.square().sum(), x, create_graph=True)
        y.sum().backward()
        host.call(x.int(), layer.bn, layer.sc, False, (4,))
        del y
    assert [sys.getrefcount(o) for o in objects] == before


@DEVICES
def test_two_threads(device):
    pairs = [pair(device, cls) for cls in (DNB, DNC)]
    maps = [values(device, 2, 3, 2, 2), values(device, 3, 3, 1, 2)]
    failed = []

    def work(i):
        try:
            for j in range(4):
                check(*pairs[i], maps[(i + j) % 2])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not failed, failed
