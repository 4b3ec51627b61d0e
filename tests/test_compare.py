"""A grid runs every combination once, whatever is killed, and records what diverged."""

import io
import json
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.dataset import RepeatDataset
from mmengine.registry import init_default_scope
from rich.console import Console
from tiny_detector import make_coco, write_config

from dn_mmdet.checks import preflight
from dn_mmdet.checks.preflight import ConfigError, reserved
from dn_mmdet.experiments import compare
from dn_mmdet.experiments.compare import NamedConfig, Point, configured, differences, plan, product
from dn_mmdet.experiments.recording import read_log
from dn_mmdet.experiments.results import FOLDED, read_rows
from dn_mmdet.provenance import commit_of

ROOT = Path(__file__).parents[1]
TOOL = ROOT / 'tools' / 'compare.py'


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def config(**changes):
    cfg = dict(
        model=dict(type='Some', norm_cfg=dict(type='BN')),
        train_dataloader=dict(batch_size=8, dataset=dict(type='Data', data_root='data/some/')),
        val_dataloader=dict(batch_size=8, dataset=dict(type='Data')),
        val_evaluator=[dict(type='CocoMetric')],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=10, val_interval=5),
        param_scheduler=[
            dict(type='LinearLR', by_epoch=False, begin=0, end=100),
            dict(type='MultiStepLR', by_epoch=True, milestones=[6, 8]),
            dict(type='OneCycleLR', eta_max=0.2, by_epoch=True, total_steps=10),
        ],
    )
    return Config(dict(cfg, **changes))


def point(cfg=None, name='some', **values):
    return Point(NamedConfig(name, f'{name}.py', cfg or config()), **{'seed': 0, **values})


def test_a_point_at_the_configs_own_values_changes_no_schedule():
    cfg, numbers = configured(point(seed=3))
    assert numbers == dict(seed=3, lr_factor=1.0, lr=0.1, batch=8, epochs=10)
    assert cfg.param_scheduler == config().param_scheduler
    assert cfg.train_cfg == config().train_cfg
    assert cfg.randomness.seed == 3


def test_of_a_preset_some_variants_can_be_chosen_and_the_first_stays():
    points = [point(name=name, seed=seed) for seed in (0, 1) for name in ('bn', 'a', 'b')]
    assert [(p.seed, p.variant.name) for p in compare.choose(points, ['b'])] == [
        (0, 'bn'),
        (0, 'b'),
        (1, 'bn'),
        (1, 'b'),
    ]
    with pytest.raises(ConfigError, match='c, d: no such variant; expected some of a, b'):
        compare.choose(points, ['d', 'b', 'c'])


def test_the_learning_rate_follows_factor_and_batch_and_schedules_with_it():
    cfg, numbers = configured(point(lr_factor=4.0, batch=16))
    assert numbers['lr'] == cfg.optim_wrapper.optimizer.lr == pytest.approx(0.8)
    assert cfg.train_dataloader.batch_size == 16
    assert cfg.param_scheduler[2].eta_max == pytest.approx(1.6)
    assert cfg.param_scheduler[0].end == 50  # half as many iterations in an epoch
    assert cfg.param_scheduler[1].milestones == [6, 8]


def test_schedules_keep_their_shape_when_epochs_change():
    cfg, numbers = configured(point(epochs=5))
    assert numbers['epochs'] == cfg.train_cfg.max_epochs == 5
    assert cfg.param_scheduler[0].end == 50
    assert cfg.param_scheduler[1].milestones == [3, 4]
    assert cfg.param_scheduler[2].total_steps == 5
    assert cfg.param_scheduler[2].eta_max == 0.2
    assert configured(point(epochs=2))[0].train_cfg.val_interval == 2


@pytest.mark.parametrize('epochs, periods', [(5, [4, 1]), (2, [2, 1]), (20, [16, 4])])
def test_periods_stay_in_their_order_and_what_begins_on_the_way_at_its_share(epochs, periods):
    given = config(
        param_scheduler=[
            dict(type='CosineRestartLR', periods=[8, 2], restart_weights=[1, 0.5], eta_min=0.0),
            dict(type='ExponentialLR', gamma=0.9),
            dict(type='MultiStepLR', gamma=0.1, milestones=[5]),
        ],
        custom_hooks=[
            dict(type='PipelineSwitchHook', switch_epoch=8, switch_pipeline=[]),
            dict(type='YOLOXModeSwitchHook', num_last_epochs=4),
        ],
    )
    given.train_cfg.dynamic_intervals = [(6, 1)]
    cfg, _ = configured(Point(NamedConfig('a', 'a.py', given), 0, epochs=epochs))
    restarts, exponential, steps = cfg.param_scheduler
    assert restarts.periods == periods
    assert exponential.gamma**epochs == pytest.approx(0.9**10) and steps.gamma == 0.1
    assert max(cfg.custom_hooks[0].switch_epoch, cfg.train_cfg.dynamic_intervals[0][0]) < epochs
    share = epochs / 10
    assert cfg.custom_hooks[0].switch_epoch == pytest.approx(8 * share, abs=0.65)
    assert cfg.custom_hooks[1].num_last_epochs == pytest.approx(4 * share, abs=0.5)
    assert cfg.train_cfg.dynamic_intervals[0][0] == pytest.approx(6 * share, abs=0.5)


def test_exponential_decay_in_iterations_follows_their_number_and_none_is_none():
    given = config(
        param_scheduler=[
            dict(type='ExponentialLR', gamma=0.9, by_epoch=True, convert_to_iter_based=True),
            dict(type='LinearLR', begin=None, end=None, by_epoch=True),
            dict(type='CosineRestartLR', periods=None, restart_weights=[1]),
        ]
    )
    cfg, _ = configured(Point(NamedConfig('a', 'a.py', given), 0, batch=4))
    assert cfg.param_scheduler[0].gamma == pytest.approx(0.9**0.5)  # twice the iterations
    assert cfg.param_scheduler[1].end is None
    same, _ = configured(Point(NamedConfig('a', 'a.py', given), 0))
    assert same.param_scheduler[0].gamma == pytest.approx(0.9)


def test_an_automatic_learning_rate_is_the_real_one_in_the_table():
    cfg, numbers = configured(point(config(auto_scale_lr=dict(enable=True, base_batch_size=64))))
    assert numbers['lr'] == cfg.optim_wrapper.optimizer.lr == pytest.approx(0.1 / 8)
    assert not cfg.auto_scale_lr.enable


@pytest.mark.parametrize('kind', ['RepeatDataset', 'mmengine.RepeatDataset', RepeatDataset])
def test_epochs_are_passes_over_the_data(kind):
    repeated = config(
        train_dataloader=dict(
            batch_size=8,
            dataset=dict(type=kind, times=5, dataset=dict(type='Data', data_root='x/voc/')),
        )
    )
    cfg, numbers = configured(point(repeated, epochs=20))
    assert (cfg.train_cfg.max_epochs, numbers['epochs']) == (4, 20)
    assert configured(point(repeated))[1]['epochs'] == 50
    assert compare.data_name(cfg) == 'voc'
    with pytest.raises(ConfigError, match='of this config is 5'):
        configured(point(repeated, epochs=12))


@pytest.mark.parametrize('kind', ['CocoMetric', 'mmdet.CocoMetric', CocoMetric])
@pytest.mark.parametrize(
    'form',
    [
        lambda metric: metric,
        lambda metric: [dict(type='VOCMetric'), metric],
        lambda metric: dict(metrics=[metric]),
    ],
    ids=['dict', 'list', 'metrics'],
)
def test_mmdets_coco_metric_is_asked_for_its_classes(kind, form):
    metric = dict(type=kind)
    compare._ask_for_classes(form(metric))
    assert metric['classwise'] is True


def test_the_config_that_was_given_is_left_as_it_is():
    given = config()
    configured(point(given, lr_factor=2.0, batch=4, epochs=20))
    assert given.to_dict() == config().to_dict()


def test_every_class_is_asked_for_and_two_checkpoints_are_kept():
    cfg, _ = configured(point())
    assert cfg.val_evaluator[0].classwise
    # mmengine removes the oldest before it writes: of one, a kill could leave none
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert cfg.custom_hooks[-1].type == 'RecordRun'
    assert 'dn_mmdet.experiments.recording' in cfg.custom_imports.imports


@pytest.mark.parametrize(
    'changes', [dict(train_cfg=dict(max_iters=100)), dict(optim_wrapper=dict(head=dict(lr=1)))]
)
def test_a_config_that_no_grid_can_be_made_of_is_told(changes):
    with pytest.raises(ConfigError, match='expected a config with'):
        configured(point(config(**changes)))


def test_a_grid_that_is_cut_short_has_whole_comparisons():
    variants = [NamedConfig(name, name, config()) for name in 'ab']
    points = product(variants, [0, 1], [1.0, 4.0], [None, 16], 3)
    assert len(points) == len(set(points)) == 2 * 2 * 2 * 2
    assert [(p.seed, p.variant.name) for p in points[:2]] == [(0, 'a'), (0, 'b')]
    assert [p.seed for p in points] == [0] * 8 + [1] * 8


def test_norms_are_no_difference_and_the_rest_is_listed():
    other = config(
        model=dict(type='Some', norm_cfg=dict(type='DNB', bound=None)),
        custom_imports=dict(imports=['dn_mmdet']),
        work_dir='elsewhere',
    )
    assert differences(config(), other) == []
    other.optim_wrapper.optimizer.lr = 0.3
    other.train_cfg.max_epochs = 12
    assert differences(config(), other) == [
        'optim_wrapper.optimizer.lr: 0.1 and 0.3',
        'train_cfg.max_epochs: 10 and 12',
    ]


def test_configs_that_differ_in_more_than_the_norm_go_on_only_if_allowed(tmp_path):
    (tmp_path / 'images').mkdir()
    make_coco(tmp_path)
    cfgs = [Config.fromfile(write_config(tmp_path, norm)) for norm in ('BN', 'DNB')]
    variants = [NamedConfig(name, name, cfg) for name, cfg in zip('ab', cfgs, strict=True)]
    points = product(variants, [0])
    assert compare.check(points) == points
    cfgs[1].optim_wrapper.optimizer.lr = 0.5
    with pytest.raises(ConfigError, match=r'b differs from a .*\n.*lr: 0.01 and 0.5'):
        compare.check(points)
    checked = compare.check(points, allow_different=True)
    assert checked[1].variant.different == ('optim_wrapper.optimizer.lr: 0.01 and 0.5',)
    cfgs[1].model.backbone.norm_cfg.type = 'DBN'
    with pytest.raises(ConfigError, match='DBN'):
        compare.check(points, allow_different=True)


def test_a_folder_with_a_run_of_another_config_is_not_taken_for_this_one(tmp_path):
    (run,) = plan([point()], tmp_path, 'why', 'abc')
    run.folder.mkdir(parents=True)
    compare.write_json(run.folder / 'run.json', run.spec)
    assert plan([point()], tmp_path, 'why', 'another commit') == [run]
    with pytest.raises(ConfigError, match='another config'):
        plan([point(config(env_cfg=dict(cudnn_benchmark=True)))], tmp_path, 'why', 'abc')


# --- the grid, with a trainer that takes a moment instead of minutes ---

TRAINER = """
import fcntl, json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])
if 'taken' in str(folder) and (folder / 'starts.json').read_text() == '1':
    sys.exit(75)
with open(folder / '.train.lock', 'a+') as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    log = folder / 'log.jsonl'
    done = len(log.read_text().splitlines()) if log.is_file() else 0
    for step in range(done + 1, 9):
        time.sleep(0.05)
        with open(log, 'a') as file:
            file.write(json.dumps(dict(step=step, steps=8, epoch=step / 4, seconds=1., loss=1.,
                                       time=0.1, pid=os.getpid())) + '\\n')
        if step == 4 and 'diverging' in str(folder):
            with open(log, 'a') as file:
                file.write(json.dumps(dict(step=4, steps=8, epoch=1, seconds=1.,
                                           diverged='the loss became nan')) + '\\n')
            sys.exit(1)
        if step == 4 and 'noisy' in str(folder):
            print('AssertionError: classification scores become infinite or NaN!')
            sys.exit(1)
        if step == 4 and 'failing' in str(folder):
            print('RuntimeError: no such operator')
            sys.exit(3)
    (folder / 'epoch_1.pth').touch()
    (folder / 'measured.json').write_text(json.dumps(dict(
        norms={'DNB' if 'dn' in folder.parent.name else 'BN': 1}, parameters=5,
        mult_adds=None, peak_memory=dict(megabytes=1.))))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    path = tmp_path / 'trainer.py'
    path.write_text(TRAINER)
    monkeypatch.setattr(compare, 'TRAIN', path)
    return path


def runs_of(folder, *names, seeds=(0,)):
    return plan(
        product([NamedConfig(name, f'{name}.py', config()) for name in names], seeds),
        folder,
        '',
        'abc',
    )


def test_what_ended_is_not_repeated_what_diverged_is_a_result_and_what_failed_is_told(
    tmp_path, trainer
):
    runs = runs_of(tmp_path / 'out', 'good', 'diverging', 'noisy', 'failing')
    failures = compare.run_grid(runs, 2, Console(file=io.StringIO()))
    assert list(failures) == [runs[3].name]
    assert 'exit code 3' in failures[runs[3].name]
    assert 'no such operator' in failures[runs[3].name]
    results = [compare.read_result(run.folder) for run in runs]
    assert [result and result['status'] for result in results] == [
        'finished',
        'diverged',
        'diverged',
        None,
    ]
    assert results[1]['reason'] == 'the loss became nan'
    assert 'infinite or NaN' in results[2]['reason']
    assert results[0]['seconds'] == 8 and results[0]['steps'] == 8
    starts = [json.loads((run.folder / 'starts.json').read_text()) for run in runs]
    assert starts == [1, 1, 1, 1]
    compare.run_grid(runs, 2, Console(file=io.StringIO()))  # the failed one alone is tried again
    starts = [json.loads((run.folder / 'starts.json').read_text()) for run in runs]
    assert starts == [1, 1, 1, 2]


FOLDER = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
with open(folder / 'foldings', 'a') as file:
    file.write('x')
if 'hopeless' in str(folder):
    print('ConfigError: no such images')
    sys.exit(2)
(folder / 'folded.json').write_text(json.dumps(dict(folded={})))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / 'folder.py').write_text(FOLDER)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setattr(compare, 'FOLD', 'folder')


def foldings(run):
    path = run.folder / 'foldings'
    return len(path.read_text()) if path.is_file() else 0


def test_runs_that_finish_are_folded_once_and_those_that_diverge_are_not(
    tmp_path, trainer, folder
):
    runs = runs_of(tmp_path / 'out', 'bn', 'dnb', 'diverging_dnb', 'hopeless_dnb')
    failures = compare.run_grid(runs, 2, Console(file=io.StringIO()), folded=True)
    assert [foldings(run) for run in runs] == [0, 1, 0, 1]
    assert compare.read_folded(runs[0].folder) == dict.fromkeys(
        FOLDED, compare.read_result(runs[0].folder)['metrics']
    )
    assert list(failures) == [runs[3].name] and 'no such images' in failures[runs[3].name]
    assert 'exit code 2; the end of' in failures[runs[3].name]
    assert not (runs[3].folder / 'failure.json').exists()  # its training has not failed
    out = io.StringIO()
    compare.run_grid(runs, 2, Console(file=out), folded=True)  # tries again what failed
    assert '4 runs, 3 of them ended before' in out.getvalue()
    assert [foldings(run) for run in runs] == [0, 1, 0, 2]
    assert [json.loads((run.folder / 'starts.json').read_text()) for run in runs] == [1] * 4


def test_runs_that_finished_before_are_folded_where_their_checkpoint_is_there(
    tmp_path, trainer, folder
):
    runs = runs_of(tmp_path / 'out', 'bn', 'dnb', 'gone_dnb')
    compare.run_grid(runs, 2, Console(file=io.StringIO()))
    assert [foldings(run) for run in runs] == [0, 0, 0]
    (runs[2].folder / 'epoch_1.pth').unlink()
    compare.run_grid(runs, 2, Console(file=io.StringIO()), folded=True)
    assert [foldings(run) for run in runs] == [0, 1, 0]
    assert [compare.read_folded(run.folder) is not None for run in runs] == [True, True, False]
    assert [json.loads((run.folder / 'starts.json').read_text()) for run in runs] == [1] * 3


def test_an_interruption_leaves_no_training_behind(tmp_path, trainer, monkeypatch):
    (run,) = runs_of(tmp_path / 'out', 'good')

    def interrupt(folder):
        if not read_log(folder):
            return 0, ''
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, '_share_done', interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare.run_grid([run], 1, Console(file=io.StringIO()))
    assert not preflight.is_reserved(run.folder)
    steps = len(read_log(run.folder))
    monkeypatch.undo()
    monkeypatch.setattr(compare, 'TRAIN', trainer)
    compare.run_grid([run], 1, Console(file=io.StringIO()))
    assert 0 < steps < 8
    assert [line['step'] for line in read_log(run.folder)] == list(range(1, 9))


def test_a_run_that_another_process_trains_is_waited_for(tmp_path, trainer):
    (run,) = runs_of(tmp_path / 'out', 'good')
    run.folder.mkdir(parents=True)
    other = subprocess.Popen([sys.executable, trainer, '--work-dir', run.folder])
    while not preflight.is_reserved(run.folder):
        time.sleep(0.01)
    compare.run_grid([run], 1, Console(file=io.StringIO()))
    assert other.wait() == 0
    assert {line['pid'] for line in read_log(run.folder)} == {other.pid}
    assert not (run.folder / 'starts.json').exists()


def test_a_run_whose_folder_another_process_took_first_is_tried_again(tmp_path, trainer):
    assert preflight.FolderInUse.exit_code == 75  # as the trainer ends
    (run,) = runs_of(tmp_path / 'out', 'taken')
    assert compare.run_grid([run], 1, Console(file=io.StringIO())) == {}
    assert compare.read_result(run.folder)['status'] == 'finished'
    assert json.loads((run.folder / 'starts.json').read_text()) == 2


@pytest.mark.slow
def test_a_lock_ends_with_its_holder(tmp_path):
    assert not preflight.is_reserved(tmp_path)
    code = (
        f'from dn_mmdet.checks.preflight import reserved\nwith reserved({str(tmp_path)!r}):\n'
        '    print("held", flush=True)\n    input()'
    )
    with subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', code],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        while 'held' not in holder.stdout.readline():
            pass
        assert preflight.is_reserved(tmp_path)
        holder.kill()
    assert not preflight.is_reserved(tmp_path)
    with reserved(tmp_path):
        pass


def test_trust_is_handed_to_the_trainings(tmp_path, trainer):
    (run,) = runs_of(tmp_path / 'grid', 'bn')
    run.folder.mkdir(parents=True)
    assert compare._training(run, trust=False)[-1] != '--trust-checkpoint'
    assert compare._training(run, trust=True)[-1] == '--trust-checkpoint'


def test_a_run_goes_on_from_the_last_checkpoint_that_is_whole(tmp_path):
    whole = dict(meta=dict(epoch=1, iter=5), message_hub={}, optimizer={}, state_dict={})
    torch.save(whole, tmp_path / 'epoch_9.pth')
    torch.save(whole, tmp_path / 'epoch_10.pth')
    cut = (tmp_path / 'epoch_10.pth').read_bytes()
    (tmp_path / 'epoch_11.pth').write_bytes(cut[: len(cut) // 2])
    # the path of another machine, as in a folder that was copied
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_11.pth')
    assert compare._resume(tmp_path) == ['--resume', tmp_path / 'epoch_10.pth']
    for name in ('epoch_9.pth', 'epoch_10.pth'):
        (tmp_path / name).unlink()
    assert compare._resume(tmp_path) == []
    assert not (tmp_path / 'epoch_11.pth').exists()  # else training would refuse the folder


def test_where_git_cannot_tell_the_commit_is_unknown(tmp_path):
    assert commit_of(tmp_path) == 'unknown'


def test_an_environment_inside_another_checkout_has_no_commit_and_a_changed_config_counts(
    tmp_path,
):
    def git(*arguments):
        who = '-c', 'user.name=a', '-c', 'user.email=a@b'
        subprocess.run(['git', '-C', tmp_path, *who, *arguments], check=True, capture_output=True)

    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / 'a.py').write_text('a = 1')
    git('init')
    git('add', '.')
    git('commit', '-m', 'a')
    (tmp_path / 'site-packages').mkdir()
    assert commit_of(tmp_path / 'site-packages') == 'unknown'
    before = commit_of(tmp_path)
    assert re.fullmatch('[0-9a-f]{10}', before)
    (tmp_path / 'configs' / 'a.py').write_text('a = 2')
    assert commit_of(tmp_path) == f'{before}+'


def test_what_was_made_of_a_checkpoint_is_none_of_the_trainings(tmp_path):
    for name in ('epoch_9', 'epoch_10', 'epoch_10_folded', 'epoch_11_folded_3'):
        (tmp_path / f'{name}.pth').touch()
    assert [path.stem for path in compare.epoch_checkpoints(tmp_path)] == ['epoch_9', 'epoch_10']
    assert compare.last_checkpoint(tmp_path).stem == 'epoch_10'
    compare._keep_last_checkpoint(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == {
        'epoch_10',
        'epoch_10_folded',
        'epoch_11_folded_3',
    }
    assert compare.last_checkpoint(tmp_path / 'nowhere') is None


# --- the real thing ---


@pytest.fixture(scope='module')
def detectors(tmp_path_factory):
    root = tmp_path_factory.mktemp('detectors')
    (root / 'images').mkdir()
    make_coco(root)
    return [write_config(root, norm) for norm in ('BN', 'DNB')]


def tool(*arguments):
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', TOOL, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def to_the_end(*arguments):
    """What the tool prints, which has to end well."""
    with tool(*arguments) as process:
        output = process.stdout.read()
    assert process.returncode == 0, output
    return output


def lines_in(out):
    return sum(len(read_log(path.parent)) for path in out.rglob('log.jsonl'))


@pytest.mark.slow
def test_a_grid_that_is_killed_at_random_moments_loses_and_repeats_nothing(detectors, tmp_path):
    """2 configs x 2 seeds, killed three times so that the grid cannot say goodbye."""
    out = tmp_path / 'out'
    command = (*detectors, '--seeds', 0, 1, '--epochs', 3, '--jobs', 2, '--out', out)
    rng = random.Random(time.time_ns())
    ended = {}
    for _ in range(3):
        before = lines_in(out)
        with tool(*command) as grid:
            while lines_in(out) == before and grid.poll() is None:
                time.sleep(0.1)
            time.sleep(rng.uniform(0, 8))
            grid.send_signal(signal.SIGKILL)
        for path in out.rglob('result.json'):
            assert ended.setdefault(path, path.read_bytes()) == path.read_bytes()
    assert 'ended before; 2 at once' in to_the_end(*command)
    folders = [path.parent for path in out.rglob('run.json')]
    assert len(folders) == 4
    for path, content in ended.items():
        assert path.read_bytes() == content
    for folder in folders:
        assert compare.read_result(folder)['status'] == 'finished'
        lines = read_log(folder)
        assert [line['step'] for line in lines if 'loss' in line] == list(range(1, 7))
        assert [line['step'] for line in lines if 'metrics' in line] == [2, 4, 6]
        assert len(list(folder.glob('epoch_*.pth'))) == 1
        assert set(compare.read_folded(folder)['folded']) == set(lines[-1]['metrics'])
    assert '4 of them ended before' in to_the_end(*command)
    assert 'tiny_dnb' in (out / 'report' / 'report.md').read_text()
    assert all(row['folded'] is not None for row in read_rows(out / 'report' / 'runs.csv'))


@pytest.mark.parametrize(
    'arguments,message',
    [
        (('--preset', 'robustness', 'a.py', 'b.py'), 'expected one config'),
        (('a.py', '--variants', 'dnb'), 'none is given'),
        ((), 'expected config files, or --report-only'),
        (('a.py', '--lr', 'x0'), 'expected a factor above 0'),
        (('a.py', '--batch', '2.5'), 'expected an integer'),
        (('absent.py',), 'no such config'),
        (('tiny_bn.py', 'tiny_bn.py'), 'different file names'),
        (('tiny_bn.py', '--cfg-options', 'model.backbone.norm_cfg.type=DBN'), 'DBN'),
        (('--report-only', 'images'), 'holds no runs'),
    ],
)
def test_the_tool_says_what_is_wrong_before_it_writes(
    arguments, message, detectors, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(detectors[0].parent)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(TOOL))['main']([*arguments, '--out', str(tmp_path / 'out')])
    signal.signal(signal.SIGTERM, handler)
    assert left.value.code == 2
    assert message in ' '.join(capsys.readouterr().err.split())
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['out/report/report.md', 'rows.csv'])
def test_a_report_replaces_no_file_of_others(name, detectors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text('mine')
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(TOOL))['main']([str(detectors[0]), '--out', 'out', '--csv', 'rows.csv'])
    signal.signal(signal.SIGTERM, handler)
    assert left.value.code == 2 and 'expected' in capsys.readouterr().err
    assert [path for path in Path().rglob('*') if path.is_file()] == [Path(name)]
    assert Path(name).read_text() == 'mine'
