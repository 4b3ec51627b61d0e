"""Two gloo processes with parts of a batch against one process with the whole of it."""

import copy
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import awake
from mmengine.model import convert_sync_batchnorm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dn_mmdet import DNB, DNC, SyncDNB, SyncDNC

TIMEOUT = 120  # seconds; a missed all-reduce would otherwise wait for ever


def join_group(rank, store):
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """A function that runs ``fn(rank, *args)`` in both processes and returns both results."""
    store = tmp_path_factory.mktemp('gloo') / 'store'
    processes = [
        ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), join_group, (rank, store))
        for rank in range(2)
    ]

    def run(fn, *args):
        futures = [p.submit(call, fn, rank, *args) for rank, p in enumerate(processes)]
        return [future.result(TIMEOUT) for future in futures]

    yield run
    for process in processes:
        process.shutdown(wait=False, cancel_futures=True)
        for child in list((process._processes or {}).values()):
            child.terminate()  # one that hangs in an all-reduce does not end by itself


def call(fn, rank, *args):
    """In the child: tensors go back as numpy, by value and not by shared memory."""
    torch.set_num_threads(1)
    return to_numpy(fn(rank, *args))


def to_numpy(value):
    if isinstance(value, dict):
        return {k: to_numpy(v) for k, v in value.items()}
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value


def make_layer(cls, convert=None, **kwargs):
    """The same layer in every process, with running statistics that are not the start's."""
    torch.manual_seed(1)
    layer = awake(cls(6, min_channels=5, **kwargs)).double()
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    if layer.track_running_stats:
        nn.init.normal_(layer.running_mean)
    if convert == 'torch':
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    elif convert == 'mmengine':
        layer = convert_sync_batchnorm(layer)
    return layer


def make_batch(num):
    generator = torch.Generator().manual_seed(2)
    x, upstream = torch.randn(2, num, 6, 5, 3, dtype=torch.float64, generator=generator)
    return x * torch.arange(1, num + 1).view(-1, 1, 1, 1) + 3, upstream


def step(layer, x, upstream, checkpointed=False):
    x = x.clone().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    (y * upstream).sum().backward()
    grads = {f'grad {name}': p.grad for name, p in layer.named_parameters()}
    return dict(y=y, dx=x.grad, **grads, **dict(layer.named_buffers()))


def half_step(rank, sizes, num_steps, training, checkpointed, cls, convert, kwargs):
    layer = make_layer(cls, convert, **kwargs).train(training)
    for _ in range(num_steps):
        layer.zero_grad()
        x, upstream = (t.split(sizes)[rank] for t in make_batch(sum(sizes)))
        result = step(layer, x, upstream, checkpointed)
    return result


def whole_step(sizes, num_steps, training, checkpointed, cls, kwargs):
    layer = make_layer(cls, **kwargs).train(training)
    for _ in range(num_steps):
        layer.zero_grad()
        result = step(layer, *make_batch(sum(sizes)), checkpointed)
    return to_numpy(result)


def check_halves(halves, whole, close):
    for key, expected in whole.items():
        got = [torch.as_tensor(half[key]) for half in halves]
        expected = torch.as_tensor(expected)
        if key in ('y', 'dx'):
            close(torch.cat(got), expected)
        elif key.startswith('grad'):  # each process has its own part of the sum
            close(got[0] + got[1], expected)
        else:
            for buffer in got:
                close(buffer.double(), expected.double())


CASES = [
    (SyncDNB, None, dict()),
    (SyncDNB, None, dict(inputs='standardized')),
    (SyncDNC, None, dict()),
    (SyncDNB, None, dict(momentum=None)),
    (SyncDNC, None, dict(affine=False)),
    (SyncDNB, None, dict(track_running_stats=False)),
    (DNB, 'torch', dict(inputs='standardized')),
    (DNB, 'mmengine', dict()),
    (DNC, 'torch', dict()),
    (DNC, 'mmengine', dict()),
]


@pytest.mark.shows(
    "synchronised statistics: `SyncDNB`, torch's and mmengine's conversion, RTMDet's own"
)
@pytest.mark.parametrize('sizes', [(4, 4), (5, 3), (1, 7), (8, 0), (0, 8)])
@pytest.mark.parametrize('cls, convert, kwargs', CASES)
def test_training(two_processes, sizes, cls, convert, kwargs, close):
    args = sizes, 2, True, False, cls
    check_halves(
        two_processes(half_step, *args, convert, kwargs), whole_step(*args, kwargs), close
    )


@pytest.mark.parametrize('cls, convert, kwargs', CASES)
def test_eval(two_processes, cls, convert, kwargs, close):
    if kwargs.get('track_running_stats') is False:
        sizes = (4, 4)  # batch statistics in eval are each process's own, as in torch
        halves = two_processes(half_step, sizes, 1, False, False, cls, convert, kwargs)
        for rank in range(2):
            layer = make_layer(cls, **kwargs).eval()
            x = make_batch(8)[0].split(sizes)[rank]
            close(torch.as_tensor(halves[rank]['y']), layer(x))
        return
    args = (5, 3), 1, False, False, cls
    check_halves(
        two_processes(half_step, *args, convert, kwargs), whole_step(*args, kwargs), close
    )


@pytest.mark.parametrize('cls', [SyncDNB, SyncDNC])
def test_gradient_checkpointing(two_processes, cls, close):
    args = (5, 3), 1, True, True, cls
    check_halves(two_processes(half_step, *args, None, {}), whole_step(*args, {}), close)


def one_value_each(rank, total):
    layer = SyncDNB(6).double()
    x = torch.randn(1 if rank < total else 0, 6, 1, 1, dtype=torch.float64)
    y = layer(x)
    return dict(
        finite=bool(y.isfinite().all()),
        tracked=layer.num_batches_tracked,
        mean=layer.running_mean,
        var=layer.running_var,
    )


@pytest.mark.parametrize('total', [2, 1, 0])
def test_one_value_in_a_process_is_no_error(two_processes, total):
    """As in torch's SyncBatchNorm; and nothing is NaN when there is one value in all."""
    for result in two_processes(one_value_each, total):
        assert result['finite'] and result['tracked'] == 1
        assert torch.as_tensor(result['mean']).isfinite().all()
        assert torch.as_tensor(result['var']).isfinite().all()
        if total == 0:
            assert not result['mean'].any() and (result['var'] == 1).all()


def make_network(kwargs):
    torch.manual_seed(3)
    return awake(
        nn.Sequential(
            nn.Conv2d(6, 8, 3),
            DNB(8, **kwargs),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            DNC(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 1),
        ),
        std=0.2,
    ).double()


def train_network(net, batches, accumulate=1, no_sync=None):
    """Steps of SGD, each of `accumulate` batches; the loss is a mean over samples."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for i, x in enumerate(batches):
        last = (i + 1) % accumulate == 0
        with no_sync() if no_sync and not last else torch.enable_grad():
            net(x).square().mean().backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()


def ddp_training(rank, kwargs, broadcast_buffers, accumulate):
    net = make_network(kwargs)
    ddp = DistributedDataParallel(net, broadcast_buffers=broadcast_buffers)
    nn.SyncBatchNorm.convert_sync_batchnorm(net)  # after: see the next test
    batches = [make_batch(8)[0].roll(i, 0).chunk(2)[rank] / 8 for i in range(4)]
    train_network(ddp, batches, accumulate, ddp.no_sync)
    return net.state_dict()


@pytest.mark.shows('DDP, buffers broadcast or not, accumulated gradients')
@pytest.mark.parametrize('kwargs', [dict(), dict(bn_requires_grad=False)])
@pytest.mark.parametrize('broadcast_buffers', [True, False])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_ddp(two_processes, kwargs, broadcast_buffers, accumulate, close):
    net = make_network(kwargs)
    start = copy.deepcopy(net.state_dict())
    train_network(net, [make_batch(8)[0].roll(i, 0) / 8 for i in range(4)], accumulate)
    halves = two_processes(ddp_training, kwargs, broadcast_buffers, accumulate)
    for name, expected in net.state_dict().items():
        for half in halves:
            close(torch.as_tensor(half[name]).double(), expected.double())
        stays = name in ('1.bn.weight', '1.bn.bias') and kwargs
        assert torch.equal(start[name], expected) == bool(stays), name


def ddp_of_sync(rank):
    with pytest.raises(ValueError, match='SyncBatchNorm layers only work with GPU modules'):
        DistributedDataParallel(SyncDNB(6))


def test_on_a_cpu_ddp_itself_refuses_an_inner_sync_batch_norm(two_processes):
    two_processes(ddp_of_sync)


def unsynchronised(rank, broadcast_buffers):
    net = nn.Sequential(DNB(6), nn.Conv2d(6, 1, 1)).double()
    ddp = DistributedDataParallel(net, broadcast_buffers=broadcast_buffers)
    for _ in range(2):
        ddp(make_batch(8)[0].chunk(2)[rank]).mean().backward()
    return dict(mean=net[0].running_mean, grad=net[0].sc.w_out.grad)


def test_ddp_of_plain_dnb_keeps_each_process_its_own_statistics(two_processes):
    for broadcast_buffers in (True, False):
        first, second = two_processes(unsynchronised, broadcast_buffers)
        assert (first['grad'] == second['grad']).all() and first['grad'].any()
        assert (first['mean'] != second['mean']).all()


def rtmdet(rank, norm):
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.hub import get_config
    from mmengine.registry import init_default_scope

    register_all_modules()
    init_default_scope('mmdet')
    model = get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py').model
    for part in ('backbone', 'neck', 'bbox_head'):
        model[part].norm_cfg = dict(type=norm)
    model.backbone.init_cfg = None
    detector = awake(MODELS.build(model), std=0.1).train()
    norms = [m for m in detector.modules() if isinstance(m, DNB)]
    same_images = torch.ones(1, 3, 64, 64) * torch.linspace(-1, 1, 64)
    detector.backbone((1 + rank) * same_images)
    first = next(m for m in detector.backbone.modules() if isinstance(m, DNB))
    return dict(
        num=len(norms), mean=first.running_mean, inner=sorted({type(m.bn).__name__ for m in norms})
    )


@pytest.mark.shows(
    "synchronised statistics: `SyncDNB`, torch's and mmengine's conversion, RTMDet's own"
)
def test_rtmdets_use_syncbn_keeps_dnb(two_processes):
    results = two_processes(rtmdet, 'DNB')
    for result in results:
        assert result['num'] > 50 and result['inner'] == ['SyncBatchNorm']
    assert (results[0]['mean'] == results[1]['mean']).all()


def sync_norm_hook(rank):
    from mmdet.engine.hooks import SyncNormHook

    torch.manual_seed(rank)
    model = awake(nn.Sequential(nn.Conv2d(3, 6, 1), DNB(6)))
    model[1].running_mean.fill_(rank + 1)
    sc = copy.deepcopy(model[1].sc.state_dict())
    SyncNormHook().before_val_epoch(SimpleNamespace(model=model))
    return dict(
        mean=model[1].running_mean,
        kept=all(torch.equal(value, sc[name]) for name, value in model[1].sc.state_dict().items()),
    )


def test_sync_norm_hook_averages_the_inner_statistics(two_processes):
    for result in two_processes(sync_norm_hook):
        assert (result['mean'] == 1.5).all() and result['kept']


@pytest.mark.shows('hooks, pruning, parametrizations and FSDP2 on the inner norm')
@pytest.mark.parametrize('cls, kwargs', [(DNB, {}), (DNB, dict(inputs='standardized')), (DNC, {})])
@pytest.mark.parametrize('sharded', ['bn', 'sc', 'both', 'layer'])
def test_fsdp2_on_parts_of_a_layer(one_process, sharded, cls, kwargs):
    """It gathers a module's parameters in a hook on it."""
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), make_layer(cls, **kwargs).float())
    model = copy.deepcopy(plain)
    mesh = init_device_mesh('cpu', (1,))
    layer = model[1]
    for module in dict(bn=[layer.bn], sc=[layer.sc], both=[layer.bn, layer.sc], layer=[layer])[
        sharded
    ]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    x = torch.randn(2, 4, 3, 9, 9)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (model, plain)]
    for batch in x:
        results = []
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            y = net(batch)
            y.square().mean().backward()
            optimizer.step()
            results.append(y)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x[0]), plain.eval()(x[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('use_orig_params', [True, False])
def test_fsdp1(one_process, use_orig_params):
    """It puts plain attributes in the places of parameters."""
    plain = nn.Sequential(nn.Conv2d(3, 6, 3), make_layer(DNB).float())
    model = FullyShardedDataParallel(
        copy.deepcopy(plain), device_id=torch.device('cpu'), use_orig_params=use_orig_params
    )
    x = torch.randn(4, 3, 9, 9)
    gradients = []
    for net in (model, plain):
        inputs = x.clone().requires_grad_()
        y = net(inputs)
        y.square().mean().backward()
        gradients.append((y, inputs.grad))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def one_process():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
