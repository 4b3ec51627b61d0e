"""The tools, run as a user runs them, on a detector that trains within seconds."""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from hostile import write_hostile
from mmengine.config import Config
from tiny_detector import make_coco, write_config
from tool_process import TOOLS, Tool, refuse, succeed

from dn_mmdet.checks.preflight import FolderInUse

EACH_STEP = ('--cfg-options', 'default_hooks.logger.interval=1')


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A folder with a data set, the configs of the twins, and a training of DN-B."""
    root = tmp_path_factory.mktemp('user')
    make_coco(root)
    for norm in ('BN', 'DNB'):
        write_config(root, norm)
    succeed('train', 'tiny_dnb.py', '--work-dir', 'dnb', '--seed', 0, *EACH_STEP, cwd=root)
    return root


@pytest.fixture(scope='module')
def bn(root):
    """The same training of its BN twin."""
    succeed('train', 'tiny_bn.py', '--work-dir', 'bn', '--seed', 0, *EACH_STEP, cwd=root)
    return root / 'bn'


@pytest.fixture
def user(root, tmp_path):
    """A folder of the test's own, ``work`` in it with an earlier training."""
    shutil.copytree(root / 'dnb', tmp_path / 'work')
    (tmp_path / 'work' / 'notes.txt').write_text('mine')
    last = tmp_path / 'work' / 'last_checkpoint'
    last.write_text(str(tmp_path / 'work' / 'epoch_1.pth'))
    for name in ('bn', 'dnb'):
        shutil.copy(root / f'tiny_{name}.py', tmp_path)
    return tmp_path


def snapshot(folder):
    """All files, apart from the lock that tells which process is running."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in Path(folder).rglob('*')
        if path.is_file() and path.name != '.train.lock'
    }


@pytest.fixture
def unchanged(user):
    """Fails where a test changes or removes a file that was there before.

    Yields a set, for paths that may change.
    """
    before = snapshot(user)
    may_change = set()
    yield may_change
    after = snapshot(user)
    for path in may_change:
        del before[path]
    assert len(before) > 5
    assert {path: after.get(path) for path in before} == before


def scalars(work_dir, key='loss'):
    """What was logged under a key, of the last run in a folder."""
    path = max(Path(work_dir).glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def metrics(work_dir):
    path = max(Path(work_dir).glob('*/*.json'))
    return json.loads(path.read_text())


def test_training_writes_what_mmdet_users_expect(root):
    assert {path.name for path in (root / 'dnb').iterdir() if path.is_file()} == {
        'epoch_1.pth',
        'last_checkpoint',
        'tiny_dnb.py',
        '.train.lock',
    }
    assert len(scalars(root / 'dnb')) == 2  # of 4 images in batches of 2
    assert len(scalars(root / 'dnb', 'coco/bbox_mAP')) == 1
    assert (root / 'dnb' / '.train.lock').read_text() == ''


@pytest.mark.slow
def test_a_fresh_dn_detector_starts_with_batch_norms_loss(root, bn):
    first, dn = scalars(bn)[0], scalars(root / 'dnb')[0]
    assert abs(first - dn) < 1e-4 * first


@pytest.mark.slow
def test_the_seed_decides_everything(user, root):
    """Also of the weights that a training starts from, and of the order of images."""
    for name, seed in (('same', 0), ('other', 1)):
        succeed(
            'train',
            'tiny_dnb.py',
            '--work-dir',
            name,
            '--seed',
            seed,
            '--deterministic',
            *EACH_STEP,
            cwd=user,
        )
    assert scalars(user / 'same') == scalars(root / 'dnb')
    assert scalars(user / 'other') != scalars(root / 'dnb')


def test_the_learning_rate_is_scaled_to_the_batch(user):
    succeed(
        'train',
        'tiny_dnb.py',
        '--work-dir',
        'new',
        '--auto-scale-lr',
        *EACH_STEP,
        'optim_wrapper.optimizer.lr=0.02',
        cwd=user,
    )
    assert scalars(user / 'new', 'lr') == [0.01, 0.01]  # a batch of 2, 0.02 is for 4


def test_overwrite_replaces_the_checkpoints_and_nothing_else(user):
    (user / 'work' / 'epoch_7.pth').touch()
    (user / 'work' / 'best_coco_bbox_mAP_epoch_7.pth').touch()
    (user / 'work' / 'mine.pth').touch()
    old = torch.load(user / 'work' / 'epoch_1.pth', weights_only=False)['state_dict']
    succeed('train', 'tiny_dnb.py', '--work-dir', 'work', '--overwrite', '--seed', 5, cwd=user)
    new = torch.load(user / 'work' / 'epoch_1.pth', weights_only=False)['state_dict']
    assert any(not torch.equal(old[key], new[key]) for key in old)
    assert sorted(path.name for path in (user / 'work').glob('*.pth')) == [
        'epoch_1.pth',
        'mine.pth',
    ]
    assert (user / 'work' / 'notes.txt').read_text() == 'mine'


@pytest.mark.shows('resuming a training')
@pytest.mark.slow
def test_a_killed_training_resumes_and_gives_what_an_uninterrupted_one_gives(tmp_path):
    make_coco(tmp_path, num_images=30)
    write_config(tmp_path, 'DNB', extra='train_cfg.update(max_epochs=3, val_interval=3)')
    run = ('train', 'tiny_dnb.py', '--seed', 3, *EACH_STEP)
    succeed(*run, 'work_dir=whole', cwd=tmp_path)

    work = tmp_path / 'killed'
    killed = Tool(*run, 'work_dir=killed', '--resume', cwd=tmp_path)
    killed.wait_for(r'Epoch\(train\)\s+\[2\]\[ *[3-9]/15\]')
    killed.kill()
    assert (work / 'last_checkpoint').read_text() == str(work / 'epoch_1.pth')
    assert f'process {killed.process.pid}' in (work / '.train.lock').read_text()  # stale

    assert 'holds checkpoints' in refuse(*run, 'work_dir=killed', cwd=tmp_path)
    output = succeed(*run, 'work_dir=killed', '--resume', cwd=tmp_path)
    assert 'resumed epoch: 1' in output
    assert len(scalars(work)) == 30
    assert scalars(work) == scalars(tmp_path / 'whole')[15:]
    states = [
        torch.load(folder / 'epoch_3.pth', weights_only=False)['state_dict']
        for folder in (work, tmp_path / 'whole')
    ]
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key


@pytest.mark.slow
def test_resume_in_a_fresh_folder_keeps_the_weights_that_the_config_names(user):
    output = succeed(
        'train',
        'tiny_dnb.py',
        '--work-dir',
        'new',
        '--resume',
        'auto',
        '--cfg-options',
        'load_from=work/epoch_1.pth',
        cwd=user,
    )
    assert 'Load checkpoint from work/epoch_1.pth' in output
    assert (user / 'new' / 'epoch_1.pth').is_file()


@pytest.mark.slow
def test_an_interruption_is_no_traceback(user):
    tool = Tool('train', 'tiny_dnb.py', *EACH_STEP, 'train_cfg.max_epochs=999', cwd=user)
    tool.wait_for(r'Epoch\(train\)\s+\[2\]')
    os.kill(tool.process.pid, 2)
    assert tool.wait() == 130
    assert tool.output.endswith('train.py: error: interrupted\n')
    assert 'Traceback' not in tool.output
    assert (user / 'work_dirs' / 'tiny_dnb' / 'epoch_1.pth').is_file()  # the default place


# Only a step of training shows these. By then mmengine has replaced the copy of the config.
STEPS = ('model.neck.norm_cfg.type=DNB3d', 'train_dataloader.batch_size=1')
BAD_INPUT = [
    ('model.backbone.norm_cfg.momentun=0.1', r"norm_cfg\.momentun: DNB .* 'momentum'"),
    ('model.neck.norm_cfg.type=DNb2d', r"no norm layer 'DNb2d'; did you mean 'DNB'"),
    (STEPS[0], r'expected 5D input .*got 4D'),
    (STEPS[1], r'more than 1 value per channel.*drop_last=True'),
    (
        'train_dataloader.dataset.data_root=/absent/',
        r'/absent/: no such data folder \(set by train_dataloader\.dataset\.data_root',
    ),
    (
        'val_dataloader.dataset.ann_file=absent.json',
        r'absent\.json: no such annotation file \(set by val_dataloader\.dataset\.ann_file',
    ),
    (
        'train_dataloader.dataset.ann_file={user}/damaged.json',
        r'damaged\.json: cannot be read as json .*train_dataloader\.dataset\.ann_file',
    ),
    ('model.bbox_head.num_classes=5', r'num_classes is 5, but the data set has 2 classes'),
    ('load_from=truncated.pth', r'truncated\.pth: cannot be read .*truncated, damaged'),
    ('load_from=absent.pth', r'absent\.pth: no such checkpoint'),
    ('load_from=other.pth', r'other\.pth: the weights are not of the model'),
]


@pytest.fixture
def bad_files(user):
    checkpoint = (user / 'work' / 'epoch_1.pth').read_bytes()
    (user / 'truncated.pth').write_bytes(checkpoint[: len(checkpoint) // 2])
    torch.save(dict(state_dict=torch.nn.Linear(2, 2).state_dict()), user / 'other.pth')
    (user / 'damaged.json').write_text('{"images": [{"id": 1')
    (user / 'mine.pkl').touch()
    return user


@pytest.mark.parametrize(
    'option, expected',
    BAD_INPUT,
    ids=[option.split('=')[0] + '=' + option.split('=')[1][-12:] for option, _ in BAD_INPUT],
)
def test_bad_input_is_one_message_and_spares_the_earlier_training(
    bad_files, unchanged, option, expected
):
    message = refuse(
        'train',
        'tiny_dnb.py',
        '--work-dir',
        'work',
        '--overwrite',
        '--cfg-options',
        option.format(user=bad_files),
        cwd=bad_files,
    )
    assert re.search(expected, message), message
    if option in STEPS:
        unchanged.add(bad_files / 'work' / 'tiny_dnb.py')


@pytest.mark.parametrize(
    'argv',
    [
        ('train', 'tiny_dnb.py', '--work-dir', '.'),
        ('test', 'tiny_dnb.py', 'work/epoch_1.pth', '--work-dir', '.'),
        ('test', 'work/tiny_dnb.py', 'work/epoch_1.pth', '--work-dir', 'work'),
    ],
    ids=' '.join,
)
def test_no_copy_replaces_a_config_of_the_users_or_of_a_training(user, unchanged, argv):
    message = refuse(*argv, '--cfg-options', 'optim_wrapper.optimizer.lr=0.5', cwd=user)
    assert 'expected another folder' in message and 'would replace' in message


def test_the_copy_in_a_work_folder_continues_a_training_and_is_tested(user, unchanged):
    unchanged |= {user / 'work' / 'tiny_dnb.py'}
    succeed('train', 'work/tiny_dnb.py', '--work-dir', 'work', '--resume', cwd=user)
    for _ in range(2):
        options = ('--cfg-options', 'work_dir=work')
        succeed('test', 'work/tiny_dnb.py', 'work/epoch_1.pth', *options, cwd=user)
    assert 'coco/bbox_mAP' in metrics(user / 'work' / 'test')


def test_weights_that_a_training_starts_from_are_not_removed(user, unchanged):
    message = refuse(
        'train',
        'tiny_dnb.py',
        '--work-dir',
        'work',
        '--overwrite',
        '--cfg-options',
        'model.init_cfg.type=Pretrained',
        'model.init_cfg.checkpoint=work/epoch_1.pth',
        cwd=user,
    )
    assert 'would remove work/epoch_1.pth, but the training needs it (model.init_cfg.' in message


def test_mixed_precision_on_a_cpu_is_refused(user, unchanged):
    message = refuse(
        'train', 'tiny_dnb.py', '--work-dir', 'work', '--overwrite', '--amp', cwd=user
    )
    assert '--amp' in message and 'needs a GPU' in message


def test_a_folder_with_checkpoints_is_refused(user, unchanged):
    message = refuse('train', 'tiny_dnb.py', '--work-dir', 'work', cwd=user)
    assert 'epoch_1.pth' in message and '--resume' in message and '--overwrite' in message


def test_a_folder_in_which_a_training_runs_is_refused(user):
    first = Tool(
        'train',
        'tiny_dnb.py',
        '--work-dir',
        'new',
        *EACH_STEP,
        'train_cfg.max_epochs=999',
        cwd=user,
    )
    try:
        first.wait_for(r'Saving checkpoint at 1 epochs')
        for more in (['--overwrite'], ['--resume']):
            message = refuse(
                'train',
                'tiny_dnb.py',
                '--work-dir',
                'new',
                *more,
                cwd=user,
                exit_code=FolderInUse.exit_code,
            )
            assert f'a training is running in it (process {first.process.pid} on ' in message
        assert (user / 'new' / 'epoch_1.pth').stat().st_size > 0
        assert first.process.is_alive()
    finally:
        first.kill()


@pytest.mark.parametrize(
    'argv, expected',
    [
        (['absent.py'], 'absent.py: no such config file'),
        (['tiny_dnb.py', '--cfg-options', 'model.backbone.out_indices.x=1'], '--cfg-options'),
        (['tiny_dnb.py', '--launcher', 'pytorch'], 'tools/dist_train.sh'),
        (['tiny_dnb.py', '--launcher', 'slurm'], '--launcher slurm: needs a GPU'),
        (['tiny_dnb.py', '--resume', 'truncated.pth'], 'truncated.pth: cannot be read'),
        (['tiny_dnb.py', '--resume', 'weights.pth'], 'cannot be resumed, because it lacks meta'),
        (['tiny_bn.py', '--resume', 'work/epoch_1.pth'], 'trained with Dynamic Normalization'),
        (
            [
                'tiny_dnb.py',
                '--work-dir',
                'work',
                '--overwrite',
                '--cfg-options',
                'load_from=work/epoch_1.pth',
            ],
            '--overwrite would remove',
        ),
        (['tiny_dnb.py', '--work-dir', 'tiny_bn.py/x'], 'cannot be written to'),
    ],
)
def test_other_arguments_that_cannot_work(bad_files, unchanged, argv, expected):
    checkpoint = torch.load(bad_files / 'work' / 'epoch_1.pth', weights_only=False)
    torch.save(dict(state_dict=checkpoint['state_dict']), bad_files / 'weights.pth')
    if '--work-dir' not in argv:
        argv = [*argv, '--work-dir', 'new']
    assert expected in refuse('train', *argv, cwd=bad_files)
    assert not list(bad_files.glob('new/*.pth'))


@pytest.mark.parametrize(
    'tool, part, argv',
    [
        ('train', 'optim_wrapper', ['--amp']),
        ('test', 'test_evaluator', ['work/epoch_1.pth']),
        ('predict', 'test_dataloader', ['work/epoch_1.pth', '.']),
    ],
)
def test_a_config_without_what_the_tool_needs_is_told(user, unchanged, tool, part, argv):
    (user / 'image.png').touch()
    message = refuse(tool, 'tiny_dnb.py', *argv, '--cfg-options', f'{part}=None', cwd=user)
    assert message.startswith('tiny_dnb.py: expected ') and f'it lacks {part}' in message


@pytest.mark.parametrize(
    'tool, argv',
    [
        ('train', ['--work-dir', 'new', '--resume', 'hostile.pth']),
        ('train', ['--work-dir', 'work', '--resume']),
        ('train', ['--work-dir', 'new', '--cfg-options', 'load_from=hostile.pth']),
        (
            'train',
            [
                '--work-dir',
                'new',
                '--cfg-options',
                'model.init_cfg.type=Pretrained',
                'model.init_cfg.checkpoint=hostile.pth',
            ],
        ),
        ('test', ['hostile.pth']),
        ('predict', ['hostile.pth', 'image.png']),
    ],
    ids=['resume', 'resume-auto', 'load_from', 'Pretrained', 'test', 'predict'],
)
def test_a_hostile_checkpoint_is_refused_and_never_executed(user, root, tool, argv):
    executed = write_hostile(user / 'hostile.pth')
    (user / 'work' / 'last_checkpoint').write_text(str(user / 'hostile.pth'))
    shutil.copy(root / 'images' / '0.png', user / 'image.png')
    before = snapshot(user)
    message = refuse(tool, 'tiny_dnb.py', *argv, cwd=user)
    assert 'hostile.pth: refused and not executed' in message and 'posix.mkdir' in message
    assert not executed.exists()
    after = snapshot(user)
    assert {path: after.get(path) for path in before} == before


def test_the_hostile_checkpoint_is_one(user):
    """With --trust-checkpoint it does what it was made for."""
    executed = write_hostile(user / 'hostile.pth')
    Tool(
        'train',
        'tiny_dnb.py',
        '--work-dir',
        'new',
        '--resume',
        'hostile.pth',
        '--trust-checkpoint',
        cwd=user,
    ).wait()
    assert executed.is_dir()


@pytest.mark.slow
def test_a_full_disk_spares_the_earlier_checkpoint(user):
    """As of a quota: no file may grow beyond half a checkpoint."""
    first = user / 'work' / 'epoch_1.pth'
    before = first.read_bytes()
    more = ('--work-dir', 'work', '--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    message = refuse('train', 'tiny_dnb.py', *more, cwd=user, file_size=len(before) // 2)
    assert 'File too large' in message and '--resume' in message
    assert first.read_bytes() == before
    assert (user / 'work' / 'last_checkpoint').read_text() == str(first)
    output = succeed('train', 'tiny_dnb.py', *more, cwd=user)
    assert 'resumed epoch: 1' in output
    assert (user / 'work' / 'epoch_2.pth').stat().st_size > len(before) // 2


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='a device of Linux')
def test_no_space_left_on_the_device_is_told(user):
    (user / 'work' / 'epoch_2.pth').symlink_to('/dev/full')
    message = refuse(
        'train',
        'tiny_dnb.py',
        '--work-dir',
        'work',
        '--resume',
        '--cfg-options',
        'train_cfg.max_epochs=2',
        cwd=user,
    )
    assert 'No space left on device' in message
    assert (user / 'work' / 'last_checkpoint').read_text().endswith('epoch_1.pth')


BAD_DATA = [
    (lambda coco: coco['categories'].reverse(), 'order dog, cat'),
    (lambda coco: coco['annotations'][0].pop('iscrowd'), 'id 1 has no iscrowd'),
    (lambda coco: coco['annotations'][0].update(id=0), 'the id 0'),
    (lambda coco: coco['annotations'][0].update(area=None), 'the area None'),
]


@pytest.mark.parametrize(
    'tool, argv',
    [
        ('train', ['--work-dir', 'work', '--overwrite']),
        ('test', ['work/epoch_1.pth', '--work-dir', 'new']),
    ],
)
@pytest.mark.parametrize('change, expected', BAD_DATA, ids=[name for _, name in BAD_DATA])
def test_data_that_would_be_misread_are_one_message(
    user, root, unchanged, tool, argv, change, expected
):
    coco = json.loads((root / 'instances.json').read_text())
    change(coco)
    path = user / 'misread.json'
    path.write_text(json.dumps(coco))
    options = [
        f'{part}={path}'
        for part in (
            'train_dataloader.dataset.ann_file',
            'val_dataloader.dataset.ann_file',
            'test_dataloader.dataset.ann_file',
            'val_evaluator.ann_file',
            'test_evaluator.ann_file',
        )
    ]
    message = refuse(tool, 'tiny_dnb.py', *argv, '--cfg-options', *options, cwd=user)
    assert message.startswith(f'{path}: ') and expected in message
    assert not (user / 'new').exists()


def test_labels_that_the_checkpoint_numbers_otherwise_are_told(user, unchanged):
    checkpoint = torch.load(user / 'work' / 'epoch_1.pth', weights_only=False)
    checkpoint['meta']['dataset_meta']['classes'] = ('dog', 'cat')
    torch.save(checkpoint, user / 'other.pth')
    message = refuse('test', 'tiny_dnb.py', 'other.pth', '--work-dir', 'new', cwd=user)
    assert 'test_dataloader.dataset.metainfo.classes: cat, dog' in message
    assert 'other.pth has dog, cat' in message


VISUALIZER = """
visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')],
                  name='visualizer')
default_hooks = dict(visualization=dict(_delete_=True, type='mmdet.DetVisualizationHook'))
"""


def test_test_time_augmentation_changes_the_detections_and_draws_them(user, root):
    """By default each image and its mirror image; the hook is named with its scope."""
    config = write_config(user, 'DNB', 'augmented.py', VISUALIZER)
    config.write_text(config.read_text().replace(str(user), str(root)))
    run = ('test', 'augmented.py', 'work/epoch_1.pth')
    succeed(*run, '--work-dir', 'plain', '--out', 'plain.pkl', cwd=user)
    output = succeed(
        *run, '--work-dir', 'tta', '--out', 'tta.pkl', '--tta', '--show-dir', 'drawn', cwd=user
    )
    assert 'no tta_pipeline: each image and its mirror image are used' in output
    assert 'coco/bbox_mAP' in metrics(user / 'tta')
    assert len(list((user / 'tta').glob('*/drawn/*.png'))) == 4
    plain, both = (pickle.loads((user / f'{name}.pkl').read_bytes()) for name in ('plain', 'tta'))
    for one, other in zip(plain, both, strict=True):
        assert one['img_id'] == other['img_id'] and len(other['pred_instances']['scores']) > 0
        assert not torch.equal(
            one['pred_instances']['scores'][:9], other['pred_instances']['scores'][:9]
        )


PYTHON_STYLE = """
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import CocoMetric
from mmdet.models import SingleStageDetector
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import DefaultSampler, RepeatDataset
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from mmengine.visualization import LocalVisBackend
from torch.optim import SGD

from dn_mmdet import DNB

model = MODEL
model.update(type=SingleStageDetector)
model['neck'].update(norm_cfg=dict(type=DNB, eps=0.001, momentum=0.03))
pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=Resize, scale=(64, 64), keep_ratio=False),
    dict(type=PackDetInputs, meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                        'scale_factor')),
]
data = dict(type=CocoDataset, data_root='ROOT/', ann_file='instances.json', pipeline=pipeline,
            data_prefix=dict(img='images/'), metainfo=dict(classes=('cat', 'dog')))
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=RepeatDataset, times=1, dataset=data))
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(test_mode=True, **data))
test_dataloader = val_dataloader
val_evaluator = dict(type=CocoMetric, ann_file='ROOT/instances.json')
test_evaluator = val_evaluator
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1, val_interval=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01))
default_scope = None
default_hooks = dict(visualization=dict(type=DetVisualizationHook))
visualizer = dict(type=DetLocalVisualizer, vis_backends=[dict(type=LocalVisBackend)],
                  name='visualizer')
"""


@pytest.mark.slow
def test_a_config_in_python_style_names_classes_and_works_with_every_tool(user, root):
    model = Config.fromfile(user / 'tiny_dnb.py').model.to_dict()
    text = PYTHON_STYLE.replace('MODEL', repr(model)).replace('ROOT', str(root))
    (user / 'style.py').write_text(text)
    succeed('train', 'style.py', '--work-dir', 'new', cwd=user)
    succeed('train', 'new/style.py', '--work-dir', 'new', '--resume', cwd=user)
    succeed(
        'test',
        'style.py',
        'new/epoch_1.pth',
        '--work-dir',
        'tested',
        '--show-dir',
        'drawn',
        '--tta',
        cwd=user,
    )
    assert len(list((user / 'tested').glob('*/drawn/*.png'))) == 4
    succeed('predict', 'style.py', 'new/epoch_1.pth', root / 'images', cwd=user)
    # its weights are not taken for those of another norm, which have the same names
    (user / 'dnc.py').write_text((user / 'tiny_dnb.py').read_text().replace("'DNB'", "'DNC'"))
    message = refuse('test', 'dnc.py', 'new/epoch_1.pth', cwd=user)
    assert 'trained with DN-B, the config builds DN-C' in message
    (user / 'style.py').write_text(
        text.replace("classes=('cat', 'dog')", "classes=('dog', 'cat')")
    )
    assert 'order' in refuse('train', 'style.py', '--work-dir', 'other', cwd=user)
    assert not (user / 'other').exists()


@pytest.mark.slow
@pytest.mark.parametrize('norm', ['bn', 'dnb'])
def test_testing_gives_the_map_that_training_logged(user, norm):
    succeed(
        'train',
        f'tiny_{norm}.py',
        '--work-dir',
        'new',
        '--seed',
        1,
        *EACH_STEP,
        'train_cfg.max_epochs=20',
        'train_cfg.val_interval=20',
        'default_hooks.checkpoint.interval=20',
        cwd=user,
    )
    before = snapshot(user)
    succeed(
        'test',
        f'tiny_{norm}.py',
        'new/epoch_20.pth',
        '--work-dir',
        'tested',
        '--out',
        'found/boxes.pkl',
        '--show-dir',
        'drawn',
        cwd=user,
    )
    assert {path: after for path, after in snapshot(user).items() if path in before} == before
    tested = metrics(user / 'tested')
    for key in ('coco/bbox_mAP', 'coco/bbox_mAP_50'):
        (logged,) = scalars(user / 'new', key)
        assert logged > 0
        assert abs(tested[key] - logged) < 1e-6
    found = pickle.loads((user / 'found' / 'boxes.pkl').read_bytes())
    assert len(found) == 4
    assert all(len(image['pred_instances']['scores']) > 0 for image in found)
    assert len(list((user / 'tested').glob('*/drawn/*.png'))) == 4


def test_a_test_leaves_the_training_folder_as_it_is(user, unchanged):
    succeed('test', 'tiny_dnb.py', 'work/epoch_1.pth', '--cfg-options', 'work_dir=work', cwd=user)
    assert 'coco/bbox_mAP' in metrics(user / 'work' / 'test')


@pytest.mark.parametrize(
    'argv, expected',
    [
        (['tiny_dnb.py', 'truncated.pth'], 'truncated.pth: cannot be read as a checkpoint'),
        (['tiny_dnb.py', 'absent.pth'], 'absent.pth: no such checkpoint file'),
        (['tiny_dnb.py', 'other.pth'], 'other.pth: the weights are not of the model'),
        (['tiny_bn.py', 'work/epoch_1.pth'], 'trained with Dynamic Normalization in 66 layers'),
        (
            ['tiny_dnb.py', 'work/epoch_1.pth', '--out', 'boxes.txt'],
            'expected a file name that ends in .pkl',
        ),
        (['tiny_dnb.py', 'work/epoch_1.pth', '--out', 'mine.pkl'], 'mine.pkl: exists already'),
        (
            [
                'tiny_dnb.py',
                'work/epoch_1.pth',
                '--cfg-options',
                'test_dataloader.dataset.ann_file={user}/damaged.json',
            ],
            'damaged.json: cannot be read as json',
        ),
        (
            [
                'tiny_dnb.py',
                'work/epoch_1.pth',
                '--cfg-options',
                'test_evaluator.ann_file=absent.json',
            ],
            'absent.json: no such annotation file (set by test_evaluator.ann_file',
        ),
        (
            ['tiny_dnb.py', 'work/epoch_1.pth', '--cfg-options', 'model.bbox_head.type=SSDHead'],
            "type='SSDLiteHead'",
        ),
    ],
)
def test_what_cannot_be_tested_is_told(bad_files, unchanged, argv, expected):
    argv = [arg.format(user=bad_files) for arg in argv]
    assert expected in refuse('test', *argv, '--work-dir', 'new', cwd=bad_files)


@pytest.mark.slow
def test_a_batch_norm_checkpoint_tests_a_dn_config_with_the_same_result(user, bn):
    outputs = [
        succeed(
            'test',
            f'tiny_{norm}.py',
            bn / 'epoch_1.pth',
            '--work-dir',
            norm,
            '--out',
            f'{norm}.pkl',
            cwd=user,
        )
        for norm in ('bn', 'dnb')
    ]
    assert 'holds no SC weights' in outputs[1] and 'holds no SC' not in outputs[0]
    bn, dn = (pickle.loads((user / f'{norm}.pkl').read_bytes()) for norm in ('bn', 'dnb'))
    for one, other in zip(bn, dn, strict=True):
        torch.testing.assert_close(
            one['pred_instances']['scores'],
            other['pred_instances']['scores'],
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.slow
def test_a_config_written_by_somebody_else_trains_tests_and_predicts(user, root):
    """One file without a parent, default_scope or custom_imports, with absolute paths."""
    cfg = Config.fromfile(user / 'tiny_dnb.py')
    for key in ('default_scope', 'custom_imports'):
        cfg.pop(key)
    cfg.dump(user / 'theirs.py')
    text = (user / 'theirs.py').read_text()
    assert not any(word in text for word in ('_base_', 'default_scope', 'custom_imports'))
    succeed('train', user / 'theirs.py', '--work-dir', 'new', cwd=user)
    succeed('test', user / 'theirs.py', 'new/epoch_1.pth', cwd=user)
    # what was written into the work folder is a config for every tool
    succeed(
        'predict',
        'new/theirs.py',
        'new/epoch_1.pth',
        root / 'images',
        '--score-thr',
        0.9,
        cwd=user,
    )
    written = Config.fromfile(user / 'new' / 'theirs.py')
    assert written.custom_imports.imports == ['dn_mmdet', 'dn_mmdet.models.ssdlite_head']


@pytest.mark.slow
def test_mmdets_own_ways_need_nothing_but_the_config(user, root):
    """A fresh process, in which only the config imports dn_mmdet."""
    code = """
    import sys
    import torch
    from mmdet.apis import DetInferencer, inference_detector, init_detector
    from mmengine.config import Config
    from mmengine.runner import Runner
    assert 'dn_mmdet' not in sys.modules
    cfg = Config.fromfile('tiny_dnb.py')
    cfg.work_dir = 'new'
    runner = Runner.from_cfg(cfg)
    runner.train()
    # weights alone: upstream mmengine cannot open its own checkpoints with this torch
    torch.save(dict(state_dict=runner.model.state_dict(),
                    meta=dict(dataset_meta=dict(classes=('cat', 'dog')))), 'weights.pth')
    model = init_detector('tiny_dnb.py', 'weights.pth', device='cpu')
    image = sys.argv[1]
    found = inference_detector(model, image).pred_instances
    again = DetInferencer('tiny_dnb.py', 'weights.pth', device='cpu')(
        image, return_datasamples=True)['predictions'][0].pred_instances
    assert len(found) > 0 and torch.equal(found.bboxes, again.bboxes)
    assert model.dataset_meta['classes'] == ('cat', 'dog')
    """
    subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code), root / 'images' / '0.png'],
        check=True,
        cwd=user,
        env=without_gpu(),
    )


def without_gpu(**more):
    return dict(os.environ, CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1', **more)


@pytest.mark.slow
def test_a_tool_runs_by_its_path_from_anywhere(user):
    done = subprocess.run(
        [TOOLS / 'test.py', 'tiny_bn.py', 'work/epoch_1.pth'],
        cwd=user,
        capture_output=True,
        text=True,
        env=without_gpu(PATH=f'{Path(sys.executable).parent}:/usr/bin:/bin'),
    )
    assert done.returncode == 2, done.stderr
    assert 'test.py: error: work/epoch_1.pth: trained with Dynamic' in done.stderr
    assert 'Traceback' not in done.stderr


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


# Python imports it at its start. Threads of gloo that Python leaves behind can abort the process.
# Each process writes a file of its own: what two of them print can be mixed within a line.
GLOO_THREADS_AT_EXIT = """
import atexit, os, pathlib

@atexit.register
def count():
    names = [path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')]
    if 'RANK' in os.environ:
        file = pathlib.Path(os.environ['COUNTS'], os.environ['RANK'])
        file.write_text(str(sum('gloo' in name for name in names)))
"""


@pytest.mark.slow
def test_two_processes_train_and_test_over_gloo(user):
    """Without a GPU, through the scripts; the learning rate counts both processes."""
    (user / 'sitecustomize.py').write_text(GLOO_THREADS_AT_EXIT)

    def run(script, *argv):
        counts = Path(tempfile.mkdtemp(dir=user))
        done = subprocess.run(
            [TOOLS / script, *argv],
            cwd=user,
            env=without_gpu(
                PYTHON=sys.executable, PORT=free_port(), PYTHONPATH=user, COUNTS=counts
            ),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
        return done.returncode, done.stdout, {f.name: f.read_text() for f in counts.iterdir()}

    code, output, gloo_threads = run(
        'dist_train.sh',
        'tiny_dnb.py',
        '2',
        '--work-dir',
        'new',
        '--seed',
        '0',
        '--auto-scale-lr',
        *EACH_STEP,
        'optim_wrapper.optimizer.lr=0.01',
        'auto_scale_lr.base_batch_size=2',
    )
    assert code == 0, output
    assert gloo_threads == {'0': '0', '1': '0'}, output
    assert scalars(user / 'new', 'lr') == [0.02]  # one step: 2 x 2 of the 4 images
    (logged,) = scalars(user / 'new', 'coco/bbox_mAP')

    code, output, gloo_threads = run(
        'dist_test.sh',
        'tiny_dnb.py',
        'new/epoch_1.pth',
        '2',
        '--work-dir',
        'two',
        '--out',
        'two.pkl',
    )
    assert code == 0, output
    assert gloo_threads == {'0': '0', '1': '0'}, output
    succeed(
        'test', 'tiny_dnb.py', 'new/epoch_1.pth', '--work-dir', 'one', '--out', 'one.pkl', cwd=user
    )
    assert abs(metrics(user / 'two')['coco/bbox_mAP'] - logged) < 1e-6
    one, two = (pickle.loads((user / f'{name}.pkl').read_bytes()) for name in ('one', 'two'))
    for a, b in zip(one, two, strict=True):
        assert a['img_id'] == b['img_id'] and len(a['pred_instances']['scores']) > 0
        torch.testing.assert_close(a['pred_instances'], b['pred_instances'])

    code, output, _ = run('dist_train.sh', 'tiny_dnb.py', '2', '--work-dir', 'new')
    assert code != 0
    assert output.count('train.py: error: new: holds checkpoints of an earlier') == 1


@pytest.mark.parametrize(
    'script, argv',
    [
        ('dist_train.sh', ['config.py']),
        ('dist_test.sh', ['config.py', 'x.pth']),
        ('slurm_train.sh', ['partition', 'job', 'config.py']),
    ],
)
def test_the_scripts_say_how_they_are_used(script, argv):
    done = subprocess.run([TOOLS / script, *argv], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f'# tools/{script} ')
    assert len(done.stderr.splitlines()) == 2


def test_slurm_gets_what_it_needs(tmp_path):
    """srun is replaced by a program that notes its arguments."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > srun.txt; printf %s "$PYTHONPATH" > path')
    srun.chmod(0o755)
    subprocess.run(
        [TOOLS / 'slurm_train.sh', 'gpus', 'my job', 'tiny_dnb.py', 'new', '--seed', '1'],
        cwd=tmp_path,
        check=True,
        env=without_gpu(
            PATH=f'{tmp_path}:{os.environ["PATH"]}',
            PYTHON='python3',
            GPUS='4',
            GPUS_PER_NODE='2',
            SRUN_ARGS='--time=1 --quiet',
        ),
    )
    assert (tmp_path / 'srun.txt').read_text().splitlines() == [
        '-p',
        'gpus',
        '--job-name=my job',
        '--gres=gpu:2',
        '--ntasks=4',
        '--ntasks-per-node=2',
        '--cpus-per-task=5',
        '--kill-on-bad-exit=1',
        '--time=1',
        '--quiet',
        'python3',
        '-u',
        str(TOOLS / 'train.py'),
        'tiny_dnb.py',
        '--work-dir=new',
        '--launcher=slurm',
        '--seed',
        '1',
    ]
    assert (tmp_path / 'path').read_text().split(':')[0] == f'{TOOLS}/..'
