"""Pipelines: what their transforms do to boxes and masks."""

from mmcv.transforms import Compose, RandomFlip, TestTimeAug
from mmdet.datasets import CocoDataset
from mmdet.datasets import transforms as mmdets
from mmdet.models.detectors.base import BaseDetector
from mmdet.structures import DetDataSample
from mmengine.dataset import BaseDataset
from torch import nn

from ..messages import ConfigError, some, tell

# Transforms after which objects are elsewhere, and no detector takes that back.
MOVING = (
    RandomFlip,
    mmdets.CachedMixUp,
    mmdets.CopyPaste,
    mmdets.Expand,
    mmdets.GeomTransform,
    mmdets.MinIoURandomCrop,
    mmdets.MixUp,
    mmdets.Mosaic,
    mmdets.RandomAffine,
    mmdets.RandomCenterCropPad,
    mmdets.RandomCrop,
    mmdets.RandomShift,
)


def check_nothing_moves(option: str, dataset: BaseDataset) -> None:
    """Boxes that are found in a flipped or cropped image are compared with those of the whole."""
    transforms = dataset.pipeline.transforms
    if any(isinstance(transform, TestTimeAug) for transform in transforms):
        return  # which turns them back
    for transform in _transforms(transforms):
        chance = getattr(transform, 'prob', 1)
        if isinstance(chance, (list, tuple)):
            chance = sum(chance)
        if isinstance(transform, MOVING) and chance and not getattr(transform, 'test_mode', False):
            raise ConfigError(
                f'{option}.pipeline: {type(transform).__name__} moves objects, and what is found '
                f'would be compared with where they were; AP would be wrong. Leave it out of '
                f'the pipelines of evaluation'
            )


def check_boxes_are_loaded(option: str, sample: DetDataSample, model: nn.Module) -> None:
    """Raises ConfigError where a pipeline of training data gives no boxes with labels."""
    if isinstance(model, BaseDetector) and 'labels' not in sample.gt_instances:
        raise ConfigError(
            f'{option}.pipeline: expected boxes and labels of each image, and it gives '
            f"{some(sample.gt_instances.keys()) or 'none'}. Add dict(type='LoadAnnotations', "
            f'with_bbox=True) after the transform that loads the image'
        )


def loads_masks(pipeline: Compose) -> bool:
    return any(getattr(transform, 'with_mask', False) for transform in _transforms(pipeline))


def check_runs_are_used(option: str, dataset: BaseDataset, trained: list[dict]) -> None:
    """mmdet turns boxes with run lengths into regions to ignore where polygons are asked for."""
    loading = (t for t in _transforms(dataset.pipeline) if getattr(t, 'with_mask', False))
    if any(getattr(transform, 'poly2mask', True) for transform in loading):
        return
    runs = [annotation for annotation in trained if isinstance(annotation['segmentation'], dict)]
    text = (
        f'{dataset.ann_file}: {len(runs)} of {len(trained)} segmentations are run lengths, '
        f'and LoadAnnotations(poly2mask=False) in {option}.pipeline reads polygons: their '
        f'boxes are not trained on'
    )
    if runs and len(runs) == len(trained):
        raise ConfigError(f'{text}. Leave poly2mask out, or write polygons')
    if runs:
        tell(f'{text} (the first has the id {runs[0]["id"]!r})')


def sample_of(dataset: CocoDataset, content: dict, image_id: int) -> DetDataSample | None:
    """What the pipeline makes of an image, or None where that is nothing for a detector.

    A pipeline that fails is no error here: it may want what only a training gives it.
    """
    image = next(image for image in content['images'] if image['id'] == image_id)
    annotations = content.get('annotations') or []
    dataset.cat2label = {number: label for label, number in enumerate(dataset.cat_ids)}
    try:
        info = dataset.parse_data_info(
            dict(
                raw_img_info=dict(image, img_id=image['id']),
                raw_ann_info=[a for a in annotations if a['image_id'] == image['id']],
            )
        )
        packed = dataset.pipeline(dict(info, sample_idx=0))
    except Exception:  # of any kind: a transform can raise anything
        return None
    sample = packed.get('data_samples') if isinstance(packed, dict) else None
    return sample if isinstance(sample, DetDataSample) else None


def _transforms(pipeline):
    """Each transform of a pipeline, also inside others."""
    if isinstance(pipeline, (list, tuple)):
        for transform in pipeline:
            yield from _transforms(transform)
        return
    yield pipeline
    for name in ('transforms', 'subroutines'):
        yield from _transforms(getattr(pipeline, name, ()))
