"""Detections in images, as drawn pictures and as one json."""

import json
from pathlib import Path

import cv2
import mmcv
from mmdet.apis import DetInferencer
from mmdet.apis.det_inferencer import IMG_EXTENSIONS
from mmdet.evaluation import get_classes
from mmdet.registry import DATASETS
from mmengine.config import Config
from rich.progress import track

from ..files import write_text
from ..messages import ConfigError

PREDICTIONS = 'predictions.json'
PICTURES = 'vis'  # the folder that DetInferencer draws into


def find_images(path) -> list[Path]:
    """The image itself, or the images of a folder by name, without its subfolders.

    Raises:
        ConfigError: there are none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f'{path}: no such image or folder (current folder: {Path.cwd()})')
    images = sorted(
        file for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS and file.is_file()
    )
    if not images:
        raise ConfigError(f'{path}: holds no images ({", ".join(IMG_EXTENSIONS)})')
    return images


def predict(cfg, checkpoint, images, out_dir, score_thr) -> list[Path]:
    """Writes ``vis/<name of the image>`` for each image and ``predictions.json``.

    The json is a COCO data set: images with file names, categories, and annotations
    with a ``score`` each, boxes as (x, y, width, height) in pixels of the image. The
    ids of categories are the model's own, from 0.

    Returns:
        The files that cannot be read as images; the others are done.
    """
    cfg = Config(cfg.to_dict())  # names in place of classes, which DetInferencer does not take
    cfg.setdefault('visualizer', dict(type='DetLocalVisualizer', name='visualizer'))
    cfg.visualizer.vis_backends = None  # they would want a folder; pictures are enough
    inferencer = DetInferencer(cfg, str(checkpoint), show_progress=False)
    _name_classes(inferencer, cfg)
    classes = inferencer.model.dataset_meta['classes']
    content = dict(
        images=[],
        annotations=[],
        categories=[dict(id=i, name=name) for i, name in enumerate(classes)],
    )
    unreadable = []
    for image in track(images, description='Detecting'):
        pixels = _read(image)
        if pixels is None:
            unreadable.append(image)
            continue
        sample = inferencer(
            str(image),
            return_datasamples=True,
            no_save_pred=True,
            out_dir=str(out_dir),
            pred_score_thr=score_thr,
        )['predictions'][0]
        _add(content, image.name, pixels.shape, sample.pred_instances.numpy(), score_thr)
    write_text(Path(out_dir) / PREDICTIONS, json.dumps(content))
    return unreadable


def holds_predictions(folder) -> bool:
    """Whether `predict` has written into a folder before: it may replace what it wrote."""
    try:
        content = json.loads((Path(folder) / PREDICTIONS).read_text())
        found = content.keys() == {'images', 'annotations', 'categories'}
        return found and all('score' in annotation for annotation in content['annotations'])
    except (OSError, ValueError, AttributeError, TypeError):  # none, or a file of another kind
        return False


def _name_classes(inferencer, cfg):
    """Where a checkpoint names no classes, mmdet takes COCO's; the config knows better."""
    meta = inferencer.model.dataset_meta  # the visualizer's own
    dataset = DATASETS.build({**cfg.test_dataloader.dataset, 'lazy_init': True})
    configured = dataset.metainfo.get('classes')
    if configured is not None and list(meta['classes']) == get_classes('coco'):
        meta['classes'] = configured


def _read(path):
    """Pixels, or None for a file that is no whole image."""
    try:
        return mmcv.imread(str(path))
    except (OSError, cv2.error):  # the latter for an empty file
        return None


def _add(content, name, shape, instances, score_thr):
    image_id = len(content['images'])
    content['images'].append(dict(id=image_id, file_name=name, height=shape[0], width=shape[1]))
    for label, score, (x1, y1, x2, y2) in zip(
        instances.labels.tolist(),
        instances.scores.tolist(),
        instances.bboxes.tolist(),
        strict=True,
    ):
        if score >= score_thr:
            w, h = x2 - x1, y2 - y1
            content['annotations'].append(
                dict(
                    id=len(content['annotations']) + 1,
                    image_id=image_id,
                    category_id=label,
                    bbox=[x1, y1, w, h],
                    area=w * h,
                    score=score,
                )
            )
