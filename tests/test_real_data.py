"""SSDLite with DN-B on real COCO images: trains, evaluates, is killed and resumes."""

import json
import runpy
from pathlib import Path

import pytest
from tool_process import Tool, succeed

ROOT = Path(__file__).parents[1]
SOURCE = ROOT.parent / 'shared' / 'data' / 'coco_mini_320'
CONFIG = ROOT / 'configs' / 'ssdlite_mbv2_dnb_coco.py'


def keep_images(path, count):
    """Leaves the first images in a json of COCO's, for data and evaluator alike."""
    content = json.loads(path.read_text())
    content['images'] = content['images'][:count]
    kept = {image['id'] for image in content['images']}
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] in kept]
    path.write_text(json.dumps(content))


def options(root):
    """24 images, in batches of 4, 6 steps an epoch; evaluated on those of the validation."""
    train, val = 'train_dataloader', 'val_dataloader'
    data = [
        f'{dataset}.{key}={value}'
        for dataset, split in ((f'{train}.dataset.dataset', 'train'), (f'{val}.dataset', 'val'))
        for key, value in (
            ('data_root', f'{root}/'),
            ('ann_file', f'instances_{split}.json'),
            ('data_prefix.img', 'images/'),
        )
    ]
    data.append(f'{train}.dataset.dataset.indices=24')
    loaders = [
        f'{loader}.{key}'
        for loader in (train, val)
        for key in ('num_workers=0', 'persistent_workers=False', 'batch_size=4')
    ]
    return [
        '--cfg-options',
        *data,
        *loaders,
        f'{train}.dataset.times=1',
        f'val_evaluator.ann_file={root}/instances_val.json',
        'train_cfg.max_epochs=2',
        'train_cfg.val_interval=2',
        'default_hooks.logger.interval=1',
        'model.test_cfg.score_thr=0.001',
    ]  # after 12 steps all scores are near 1 / 81


@pytest.mark.slow
def test_a_training_on_coco_images_is_killed_and_resumes(tmp_path):
    if not SOURCE.is_dir():
        pytest.skip(f'{SOURCE} is not here')
    prepare = runpy.run_path(str(ROOT / 'tools' / 'prepare_data.py'))['prepare']
    prepare('coco_mini', SOURCE, tmp_path / 'coco')
    keep_images(tmp_path / 'coco' / 'instances_val.json', 8)
    run = (
        'train',
        CONFIG,
        '--work-dir',
        'work',
        '--seed',
        0,
        '--resume',
        *options(tmp_path / 'coco'),
    )
    killed = Tool(*run, cwd=tmp_path)
    killed.wait_for(r'Epoch\(train\)\s+\[2\]\[[2-5]/6\]', timeout=300)
    killed.kill()
    assert Path((tmp_path / 'work/last_checkpoint').read_text()).name == 'epoch_1.pth'
    output = succeed(*run, cwd=tmp_path)
    assert 'resumed epoch: 1' in output and '[2][6/6]' in output
    assert (tmp_path / 'work/epoch_2.pth').is_file()
    log = max((tmp_path / 'work').glob('*/vis_data/scalars.json')).read_text()
    rows = [json.loads(line) for line in log.splitlines()]
    assert [row['epoch'] for row in rows if 'loss' in row] == [2] * 6
    assert [0 <= row['coco/bbox_mAP'] <= 1 for row in rows if 'coco/bbox_mAP' in row] == [True]
