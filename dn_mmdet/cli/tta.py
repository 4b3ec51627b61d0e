"""Test-time augmentation: a detector that merges what it finds in several views of an image."""

import copy

from mmdet.datasets.transforms import PackDetInputs
from mmdet.registry import TRANSFORMS
from mmengine.config import Config

from ..config_tree import innermost
from ..messages import ConfigError, tell
from ..registered import is_of, name_of

# What mmdet's own tools/test.py takes where a config has none.
MODEL = dict(
    type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
)
META_KEYS = (
    'img_id',
    'img_path',
    'ori_shape',
    'img_shape',
    'scale_factor',
    'flip',
    'flip_direction',
)


def augmented(cfg: Config) -> Config:
    """A config that tests with ``tta_model`` and ``tta_pipeline``, as ``--tta`` asks for.

    Where it has none of them: each image and its mirror image, by the pipeline of the
    test data, and mmdet's usual NMS over both.

    Args:
        cfg: of a detector; left as it is.

    Raises:
        ConfigError: there is no tta_pipeline, and that of the test data does not end as
            a detector's does.
    """
    cfg = copy.deepcopy(cfg)
    if cfg.get('tta_model') is None:
        tell('the config has no tta_model: DetTTAModel with an NMS at IoU 0.5 is used')
        cfg.tta_model = copy.deepcopy(MODEL)
    cfg.model = dict(cfg.tta_model, module=cfg.model)
    datasets = list(innermost(cfg.test_dataloader.dataset, 'test_dataloader.dataset'))
    pipelines = [
        cfg.get('tta_pipeline') or _flipped(dataset.get('pipeline') or [], option)
        for option, dataset in datasets
    ]
    for (_, dataset), pipeline in zip(datasets, pipelines, strict=True):
        dataset['pipeline'] = copy.deepcopy(pipeline)
    return cfg


def _flipped(pipeline, option):
    *before, last = pipeline or [{}]
    if not is_of(TRANSFORMS, last, PackDetInputs):
        raise ConfigError(
            f'--tta: the config has no tta_pipeline, and {option}.pipeline ends in '
            f'{name_of(last.get("type"))}, where PackDetInputs was expected. Add a '
            f'tta_pipeline to the config'
        )
    tell('the config has no tta_pipeline: each image and its mirror image are used')
    views = [dict(type='RandomFlip', prob=prob) for prob in (1.0, 0.0)]
    pack = dict(last, meta_keys=tuple(dict.fromkeys((*last.get('meta_keys', ()), *META_KEYS))))
    return [*before, dict(type='TestTimeAug', transforms=[views, [pack]])]
