"""Many small classifiers at once: the recipe is the config's, and the rows can be trusted."""

import copy
import functools
import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import awake
from mmengine.config import Config
from torch import nn

pytest.importorskip('mmpretrain', reason="needs the extra 'cls'", exc_type=ImportError)

import cv2  # noqa: E402
from tool_process import succeed  # noqa: E402

from dn_mmdet.checks.preflight import ConfigError, check_model  # noqa: E402
from dn_mmdet.convert import dn_layers  # noqa: E402
from dn_mmdet.experiments import (  # noqa: E402
    gpu_grid,
    gpu_plan,
    gpu_recipe,
    gpu_training,
    results,
)
from dn_mmdet.experiments.compare import NamedConfig  # noqa: E402
from dn_mmdet.experiments.gpu_grid import Grid  # noqa: E402
from dn_mmdet.experiments.gpu_recipe import Classifier, build  # noqa: E402
from dn_mmdet.experiments.gpu_training import Training  # noqa: E402
from dn_mmdet.experiments.presets import causes  # noqa: E402

CONFIG = Path(__file__).parents[1] / 'configs' / 'mobilenetv2_bn_tinyin100.py'
SIZE, CLASSES = 16, 3


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    """Pictures of three classes, told apart by their colour."""
    path = tmp_path_factory.mktemp('images') / 'images.tar.xz'
    rng = np.random.default_rng(0)
    with tarfile.open(path, 'w:xz') as tar:
        for split, images in (('train', 21), ('val', 6)):
            for label in range(CLASSES):
                for i in range(images):
                    image = rng.integers(0, 120, (SIZE, SIZE, 3), np.uint8)
                    image[..., label] += 100
                    data = cv2.imencode('.JPEG', image)[1].tobytes()
                    member = tarfile.TarInfo(f'{split}/n{label}/{i}.JPEG')
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope='module')
def images(archive):
    return gpu_training.load_images(archive, True, torch.device('cpu'))


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """The config in miniature, under its own name."""
    path = tmp_path_factory.mktemp('configs') / CONFIG.name
    path.write_text(f"""
_base_ = '{CONFIG}'
model = dict(backbone=dict(widen_factor=0.1), head=dict(num_classes={CLASSES}))
data_preprocessor = dict(num_classes={CLASSES})
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size={SIZE}, padding=2, padding_mode='reflect'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=8)
""")
    return path


def planned(config, *runs, epochs=2):
    return dict(
        columns=[*results.COLUMNS, *results.EXTRA],
        runs=gpu_plan.plan(config, runs, epochs, 'asked', 'c0ffee'),
    )


@functools.cache
def _recipe_text(config, name, epochs):
    return json.dumps(planned(config, f'{name}:0', epochs=epochs)['runs'][0]['recipe'])


def recipe_of(config, name='bn', epochs=2):
    return json.loads(_recipe_text(config, name, epochs))


def training(config, images, name='bn', batch=8, epochs=2):
    return Training(recipe_of(config, name, epochs), batch, epochs, images)


NAMES = [
    'bn',
    'dnb',
    'dnc',
    'static',
    'static-low-rank',
    'bn-rate-10',
    'bn-wide-1.1',
    'dnb-shuffled',
    'dnb-depthwise',
    'dnb-head',
]


@pytest.mark.parametrize('name', NAMES)
def test_the_model_is_that_of_the_config(name, close):
    bn = NamedConfig('bn', str(CONFIG), Config.fromfile(CONFIG))
    cfg = {p.variant.name: p.variant.cfg for p in causes(bn, [0], None, None, None)}[name]
    theirs = awake(check_model(cfg).double())
    ours = Classifier(recipe_of(CONFIG, name)).double()
    ours.load_state_dict(theirs.state_dict())  # every name and shape
    assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for mode in (True, False):
        close(ours.train(mode)(x), theirs.train(mode)(x, mode='tensor'))


def test_initial_weights_are_distributed_as_the_config_says():
    theirs = check_model(Config.fromfile(CONFIG))
    torch.manual_seed(0)
    theirs.init_weights()
    theirs = theirs.state_dict()
    for name, weight in build(recipe_of(CONFIG), 0).state_dict().items():
        if weight.numel() > 5000:
            spread = theirs[name].std().item()
            assert spread > 0 and weight.std().item() == pytest.approx(spread, rel=0.05), name
            assert weight.mean().abs() < 0.05 * spread
        elif weight.dim() == 1 and 'conv' not in name.split('.')[-2]:
            assert torch.equal(weight, theirs[name]), name


def test_models_of_one_seed_share_their_convolutions():
    bn, dnb, other = (
        build(recipe_of(CONFIG, name), seed).state_dict()
        for name, seed in (('bn', 3), ('dnb', 3), ('bn', 4))
    )
    weights = [key for key in bn if '.conv.' in key or '.fc.weight' in key]
    assert len(weights) == 53
    for key in weights:
        assert torch.equal(bn[key], dnb[key]) and not torch.equal(bn[key], other[key])


def test_the_recipe_is_the_configs(config, images):
    (run,) = planned(CONFIG, 'bn:3@lr4', epochs=18)['runs']
    assert run['row'] == dict(
        question='asked',
        data='tinyin100',
        seed=3,
        metric='accuracy/top1',
        config='mobilenetv2_bn_tinyin100',
        epochs=18,
        lr=0.4,
        batch=128,
        commit='c0ffee',
    )
    trained = training(config, images, epochs=3)
    (group,) = trained.groups
    assert (group['momentum'], group['decay']) == (0.9, 1e-4)
    assert group['params'] == list(trained.model.parameters())
    rates = trained.rates.tolist()
    assert trained.steps == len(rates) == 3 * (63 // 8)
    assert max(rates) == pytest.approx(0.1 * 1, rel=0.02) and rates[0] == pytest.approx(0.004)
    assert rates[-1] < 1e-4 and rates.index(max(rates)) in (5, 6)  # after 3 tenths


def test_rates_are_those_of_a_training_by_mmengine(config):
    """Where `ParamSchedulerHook` steps a scheduler that the runner built."""
    recipe = recipe_of(CONFIG)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    from mmengine.optim import OneCycleLR

    scheduler = OneCycleLR.build_iter_from_epoch(
        optimizer, eta_max=0.1, total_steps=2, epoch_length=10
    )
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        scheduler.step()
    assert gpu_recipe.learning_rates(recipe, 10, 20) == expected


def test_weight_and_bias_of_norms_do_not_decay_where_the_variant_says_so(config, images):
    trained = training(config, images, 'bn-no-decay')
    decays = {group['decay']: group['params'] for group in trained.groups}
    assert set(decays) == {0.0, 1e-4}
    norms = {
        id(p)
        for m in trained.model.modules()
        if isinstance(m, nn.BatchNorm2d)
        for p in m.parameters()
    }
    assert {id(p) for p in decays[0.0]} == norms and len(norms) == 2 * 52


@pytest.mark.parametrize(
    'change,message',
    [
        (lambda r: r['optim_wrapper'].update(clip_grad=dict(max_norm=1)), 'clip_grad'),
        (lambda r: r['optim_wrapper']['optimizer'].update(nesterov=True), 'nesterov'),
        (lambda r: r['optim_wrapper']['optimizer'].update(type='Adam'), 'got .*Adam'),
        (lambda r: r['train_pipeline'].insert(1, dict(type='Resize')), 'got .*Resize'),
        (lambda r: r['model']['head']['loss'].update(label_smooth_val=0.1), 'label_smooth_val'),
        (lambda r: r.update(drop_last=False), 'drop_last'),
    ],
)
def test_a_recipe_that_it_does_not_know_is_refused(change, message, config, images):
    recipe = recipe_of(config)
    change(recipe)
    with pytest.raises(ValueError, match=message):
        Training(recipe, 8, 1, images)


def test_a_batch_is_crops_and_flips_of_the_images_in_the_drawn_order(config, images):
    trained = training(config, images)
    trained.start(0)
    x, y = images['train']
    flips = trained.crops[..., 2]
    assert 0 < flips.float().mean() < 1 and trained.crops[..., :2].max() == 4
    assert trained.order[: trained.steps_per_epoch].unique().numel() == 7 * 8  # no image twice
    for step in (0, 5):
        trained.counter.fill_(step)
        made, labels = trained._next_batch()
        for i, index in enumerate(trained.order[step].tolist()):
            top, left, flip = trained.crops[step, i].tolist()
            image = np.pad(
                x[index].permute(1, 2, 0).numpy(), ((2, 2), (2, 2), (0, 0)), mode='reflect'
            )[top : top + SIZE, left : left + SIZE]
            image = image[:, ::-1] if flip else image
            wanted = (image - np.array([123.675, 116.28, 103.53])) / [58.395, 57.12, 57.375]
            np.testing.assert_allclose(made[i].permute(1, 2, 0).numpy(), wanted, atol=1e-5)
            assert labels[i] == y[index]


@pytest.fixture
def float64():
    """In float32, roundings alone part two trainings of batch 8 within a few steps."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('name', ['bn', 'dnb', 'bn-no-decay', 'static'])
def test_steps_are_those_of_torchs_sgd(name, config, images, close, float64):
    trained = training(config, images, name)
    trained.start(0)
    model = copy.deepcopy(trained.model)
    twins = dict(zip(trained.model.parameters(), model.parameters(), strict=True))
    optimizer = torch.optim.SGD(
        [
            dict(params=[twins[p] for p in group['params']], weight_decay=group['decay'])
            for group in trained.groups
        ],
        lr=1.0,
        momentum=0.9,
    )
    average = [p.detach().clone() for p in model.parameters()]
    for step in range(2):  # the momentum counts; in a third, roundings grow to 1e-10
        x, y = trained._next_batch()
        for group in optimizer.param_groups:
            group['lr'] = trained.rates[step].item()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        average = [
            a + (p.detach() - a) / (2 * 7)
            for a, p in zip(average, model.parameters(), strict=True)
        ]
        trained.advance(1)
        close(trained.losses[step], loss.detach())
    for p, twin in twins.items():
        close(p.detach(), twin.detach())
    averaged = dict(zip(map(id, trained.averaging), trained.average, strict=True))
    for p, wanted in zip(trained.model.parameters(), average, strict=True):
        close(averaged[id(p)], wanted)


def test_started_again_a_training_is_a_fresh_one(config, images):
    once = training(config, images, 'dnb')
    once.start(1)
    once.advance(10**9)
    again = training(config, images, 'dnb')
    again.start(0)
    again.advance(5)
    again.results()
    again.start(1)
    again.advance(10**9)
    assert torch.equal(once.losses, again.losses) and once.losses.all()
    for key, value in once.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key


def test_images_are_decoded_as_mmcv_does(archive, images, tmp_path):
    import mmcv

    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter='data')
    x, y = images['val']
    assert x.shape == (18, 3, SIZE, SIZE) and y.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    image = mmcv.imread(str(tmp_path / 'val/n1/2.JPEG'), channel_order='rgb')
    assert np.array_equal(x[8].permute(1, 2, 0).numpy(), image)


def test_an_archive_without_a_split_is_told(tmp_path):
    path = tmp_path / 'none.tar'
    tarfile.open(path, 'w').close()
    with pytest.raises(ValueError, match='expected train/<class>/ and val/<class>/'):
        gpu_training.load_images(path, True, torch.device('cpu'))


def test_parsing_of_runs():
    assert gpu_plan.parse_runs('bn,dnb:0,2-3@lr8@batch32') == [
        (name, seed, dict(lr=8.0, batch=32)) for seed in (0, 2, 3) for name in ('bn', 'dnb')
    ]
    for text in ('bn', 'bn:', 'bn:a', 'bn:0@size3', 'bn:0-', ':0'):
        with pytest.raises(ConfigError, match='--runs: expected'):
            gpu_plan.parse_runs(text)


def test_an_unknown_variant_and_a_run_listed_twice_are_named(config, archive, tmp_path):
    with pytest.raises(ConfigError, match='dnx: no such variant; expected some of bn, bn-no'):
        planned(config, 'dnx:0')
    with pytest.raises(ConfigError, match='dnb: listed twice'):
        gpu_plan.prepare(config, ['dnb:0-1', 'dnb:1'], tmp_path, archive)


def test_runs_can_be_put_behind_those_of_a_plan(config, archive, tmp_path):
    for question, append in (('first', True), ('second', True)):
        gpu_plan.prepare(config, ['bn:0'], tmp_path, archive, 1, question, append=append)
    plan = json.loads((tmp_path / 'plan.json').read_text())
    assert [run['row']['question'] for run in plan['runs']] == ['first', 'second']
    gpu_plan.prepare(config, ['bn:0'], tmp_path, archive, 1, 'third')
    assert len(json.loads((tmp_path / 'plan.json').read_text())['runs']) == 1


@pytest.mark.parametrize('name', [gpu_grid.PLAN, gpu_grid.ARCHIVE])
def test_a_plan_and_images_of_others_are_not_replaced(config, archive, tmp_path, name):
    (tmp_path / 'gpu').mkdir()
    (tmp_path / 'gpu' / name).write_text('{"mine": 1}')
    with pytest.raises(ConfigError, match=f'{name}: exists already; name another folder'):
        gpu_plan.prepare(config, ['bn:0'], tmp_path / 'gpu', archive, 1, 'first')
    assert [path.name for path in (tmp_path / 'gpu').iterdir()] == [name]
    assert (tmp_path / 'gpu' / name).read_text() == '{"mine": 1}'


def test_rows_of_a_grid_and_what_is_left_for_a_second_call(config, images, tmp_path):
    plan = planned(config, 'bn,dnb,static,dnc:0', 'bn:1')
    path, said = tmp_path / 'rows.csv', []
    first = dict(plan, runs=plan['runs'][:4])
    assert Grid(first, images, path, parallel=3, log=said.append).train()
    rows = {row['config']: row for row in results.read_rows(path)}
    assert set(rows) == {
        'mobilenetv2_bn_tinyin100',
        'mobilenetv2_dnb_tinyin100',
        'static',
        'mobilenetv2_dnc_tinyin100',
    }
    for row in rows.values():
        assert row['status'] == 'finished' and row['commit'] == 'c0ffee'
        assert row['value'] >= 0 and row['averaged'] >= 0 and math.isfinite(row['train_loss'])
    for name in ('mobilenetv2_bn_tinyin100', 'static'):
        assert rows[name]['folded'] == rows[name]['value'] and rows[name]['backend'] == '-'
    assert rows['static']['norm'] == 'StaticDN'
    assert rows['mobilenetv2_dnb_tinyin100']['backend'] == 'auto'
    before = path.read_text()

    assert Grid(plan, images, path, log=said.append).train()
    assert path.read_text().startswith(before) and len(results.read_rows(path)) == 5
    assert '5 runs, 4 of them ended before' in said
    assert Grid(plan, images, path, log=said.append).train()  # nothing is left
    assert len(results.read_rows(path)) == 5


@pytest.mark.slow
def test_it_learns(config, images):
    recipe = planned(config, 'dnb:0@lr0.1', epochs=20)['runs'][0]['recipe']
    trained = Training(recipe, 8, 20, images)
    trained.start(0)
    trained.advance(10**9)
    found = trained.results()
    assert found['value'] > 60 and found['averaged'] > 60  # a third is chance
    assert trained.losses.median() < math.log(CLASSES)


def test_a_diverged_run_is_a_row_and_the_others_go_on(config, images, tmp_path):
    plan = planned(config, 'bn:0@lr100000000', 'bn:0')
    assert Grid(plan, images, tmp_path / 'rows.csv', parallel=1, log=lambda _: None).train()
    first, second = results.read_rows(tmp_path / 'rows.csv')
    assert first['status'] == 'diverged' and first['value'] is None
    assert second['status'] == 'finished' and second['value'] is not None


def test_a_run_that_would_not_end_in_time_is_not_started(config, images, tmp_path):
    plan, said = planned(config, 'bn:0', 'bn:1@epochs40000', 'bn:2'), []
    grid = Grid(plan, images, tmp_path / 'rows.csv', parallel=1, seconds=60, log=said.append)
    assert not grid.train()
    assert [row['seed'] for row in results.read_rows(tmp_path / 'rows.csv')] == [0, 2]
    assert 'left: bn:1 (lr 0.1, batch 8, 40000 epochs)' in said[-1]


def test_rows_of_other_columns_are_not_written_to(config, images, tmp_path):
    (tmp_path / 'rows.csv').write_text('a,b\n1,2\n')
    (tmp_path / gpu_grid.PLAN).write_text(json.dumps(planned(config, 'bn:0')))
    (tmp_path / gpu_grid.ARCHIVE).touch()
    with pytest.raises(
        ValueError, match='expected the columns question, data'
    ):  # before it trains
        gpu_grid.train(tmp_path, tmp_path / 'rows.csv')


def test_a_backend_that_computes_wrong_values_is_not_trained_with(
    config, images, tmp_path, monkeypatch
):
    from dn_mmdet.kernels import torch_ops

    right = torch_ops.affine
    monkeypatch.setattr(torch_ops, 'affine', lambda x, m, a, c: right(x, m, 1.1 * a, c))
    plan, said, path = planned(config, 'dnb:0', 'bn:0', epochs=1), [], tmp_path / 'rows.csv'
    assert not Grid(plan, images, path, backends=('torch',), log=said.append).train()
    assert [row['norm'] for row in results.read_rows(path)] == ['BN']
    assert 'dnb was refused: torch: ' in said[-1] and 'y is off by' in said[-1]

    assert Grid(plan, images, path, backends=('torch', 'reference'), log=said.append).train()
    assert [row['backend'] for row in results.read_rows(path)] == ['-', 'reference']


@pytest.mark.parametrize('name', ['dnb', 'dnc', 'dnb-shuffled', 'dnb-scale'])
def test_the_layers_of_a_recipe_are_right_here(name, config):
    assert 0 < gpu_training.check_layers(recipe_of(config, name), 'auto', 'cpu', SIZE, 8) <= 1


def test_a_folded_model_is_dynamic_again_afterwards(config, images):
    trained = training(config, images, 'dnb')
    trained.start(0)
    awake(trained.model, std=0.1).eval()
    x = trained.prepared(images['val'][0])
    outputs = trained.generated()
    trained.model.eval()
    assert set(outputs) == set(dn_layers(trained.model)) and len(outputs) == 52
    assert all(made.count == 63 for made in outputs.values())
    with torch.no_grad():
        dynamic = trained.model(x)
        name = 'backbone.layer3.1.depthwise_conv.bn'
        with gpu_training.folded(trained.model, {name: outputs[name]}):
            assert len(dn_layers(trained.model)) == 51
            assert not torch.equal(trained.model(x), dynamic)
        assert torch.equal(trained.model(x), dynamic)


def test_recalibration_leaves_the_dynamic_layers_alone(config, images):
    trained = training(config, images, 'dnb')
    trained.start(0)
    trained.advance(3)
    before = copy.deepcopy(trained.model.state_dict())
    with gpu_training.folded(trained.model, trained.generated()):
        norm = trained.model.backbone.conv1.bn
        trained.recalibrate()
        assert norm.num_batches_tracked == 1 and norm.momentum == 0.1
    for key, value in trained.model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_gradients_in_other_strides_are_copied():
    parameter = torch.zeros(6, 4, 1, 1).to(memory_format=torch.channels_last)
    one_by_one = torch.randn(6, 4, 1, 1)
    for p, g in (
        (parameter, one_by_one),
        (torch.zeros(4, 3, 3, 3), torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)),
        (torch.zeros(3), torch.randn(3)),
    ):
        laid = gpu_training._laid_out_as(p, g)
        assert laid.stride() == p.stride() and torch.equal(laid, g)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('name', NAMES)
def test_a_graph_is_the_step_that_it_was_captured_from(name, config, archive):
    images = gpu_training.load_images(archive, True, torch.device('cuda'))
    trained = Training(recipe_of(config, name), 8, 2, images)
    trained.capture()
    trained.check_graph()
    trained.start(0)
    trained.advance(10**9)
    assert not trained.diverged()
    trained.synchronize()
    assert trained.losses.all()


@pytest.mark.slow
def test_the_tool_prepares_and_trains(config, archive, tmp_path):
    succeed(
        'gpu_evidence',
        '--prepare',
        config,
        '--runs',
        'bn,dnb:0',
        '--images',
        archive,
        '--epochs',
        '1',
        '--folder',
        tmp_path / 'gpu',
        '--commit',
        'c0ffee',
        cwd=tmp_path,
    )
    plan = json.loads((tmp_path / 'gpu/plan.json').read_text())
    assert len(plan['runs']) == 2
    for _ in range(2):
        output = succeed(
            'gpu_evidence', '--csv', 'rows.csv', '--folder', tmp_path / 'gpu', cwd=tmp_path
        )
    assert '2 runs, 2 of them ended before' in output
    assert len(results.read_rows(tmp_path / 'rows.csv')) == 2
