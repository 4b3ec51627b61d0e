"""What would end a training at its first evaluation is refused before it starts."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmdet.evaluation import CocoMetric, LVISMetric
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from tiny_detector import make_coco, write_config
from torch import nn

from dn_mmdet.checks import evaluators, preflight
from dn_mmdet.checks.preflight import ConfigError


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp('coco')
    make_coco(root)
    return Config.fromfile(write_config(root, 'DNB'))


@pytest.fixture
def cfg(original):
    return copy.deepcopy(original)


@pytest.fixture(scope='module')
def model(original):
    return preflight.check_model(original)


def evaluate(cfg):
    """An evaluation of perfect detections, as mmengine's."""
    loader = Runner.build_dataloader(cfg.val_dataloader)
    evaluator = Evaluator(copy.deepcopy(cfg.val_evaluator))
    evaluator.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        for sample in batch['data_samples']:
            truth = sample.gt_instances
            sample.pred_instances = InstanceData(
                bboxes=truth.bboxes.tensor,
                labels=truth.labels,
                scores=torch.ones(len(truth.labels)),
            )
        evaluator.process(batch['data_samples'], batch)
    return evaluator.evaluate(len(loader.dataset))


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(metric_items=['AP']), r"\.metric_items: there is no item 'AP'.* mAP"),
        (dict(metric_items=['mAP', 'mAP50']), r"\.metric_items: .* did you mean 'mAP_50'"),
        (dict(iou_thrs=[0.5]), r'\.iou_thrs: expected none.* got \[0\.5\]'),
        (dict(iou_thrs=0.5), r'\.iou_thrs: expected none'),
        (dict(proposal_nums=[100]), r'\.proposal_nums: expected at least three'),
        (dict(ann_file=None), r'\.ann_file: expected the annotation file of val_dataloader'),
        (dict(metric='bboxx'), ': metric should be one of .*bboxx'),
        (dict(format_only=True), ': outfile_prefix'),
        (dict(clas_wise=True), r"\.clas_wise: CocoMetric has no such .* mean 'classwise'"),
    ],
    ids=str,
)
def test_a_metric_that_fails_at_the_first_evaluation_is_told(
    cfg, model, tmp_path, options, expected
):
    """As it does: this is how mmengine would end."""
    cfg.val_evaluator.update(options)
    with pytest.raises(ConfigError, match=f'^val_evaluator{expected}'):
        preflight.check_data(cfg, 'val', model)
    if 'format_only' not in options:  # else mmdet leaves a folder behind
        cfg.val_evaluator.outfile_prefix = str(tmp_path / 'found')
    with pytest.raises((AssertionError, IndexError, KeyError, TypeError, ValueError)):
        evaluate(cfg)


def test_numbers_of_boxes_without_the_one_of_ap_are_told(cfg, model):
    cfg.val_evaluator.proposal_nums = (1, 10, 50)
    with pytest.raises(ConfigError, match='^val_evaluator.proposal_nums: .*100 among them'):
        preflight.check_data(cfg, 'val', model)
    assert evaluate(cfg)['coco/bbox_mAP'] == -1


RIGHT = [
    dict(),
    dict(metric=['bbox', 'proposal', 'proposal_fast']),
    dict(metric=('bbox',)[0], metric_items=['mAP', 'mAP_s']),
    dict(metric='proposal', metric_items=['AR@100']),
    dict(metric='proposal_fast', proposal_nums=[5]),
    dict(prefix='mine', classwise=True),
]


@pytest.mark.parametrize('options', RIGHT, ids=str)
def test_results_have_the_names_that_are_expected(cfg, model, options):
    cfg.val_evaluator.update(options)
    preflight.check_data(cfg, 'val', model)
    found = [name for name in evaluate(cfg) if 'precision' not in name]
    assert found == list(dict.fromkeys(evaluators._names(cfg.val_evaluator)))


def test_what_is_only_written_needs_no_right_items(cfg, model, tmp_path):
    cfg.val_evaluator.update(
        format_only=True, outfile_prefix=str(tmp_path / 'x'), metric_items=['AP'], iou_thrs=[0.5]
    )
    preflight.check_data(cfg, 'val', model)
    assert evaluate(cfg) == {}


def test_boxes_may_come_with_the_images(cfg, model):
    cfg.val_evaluator.ann_file = None
    pack = cfg.val_dataloader.dataset.pipeline[-1]
    pack.meta_keys = (*pack.meta_keys, 'instances')
    preflight.check_data(cfg, 'val', model)


def test_two_metrics_of_the_same_names_are_told(cfg, model):
    metric = cfg.val_evaluator
    cfg.val_evaluator = [metric, dict(metric, type=CocoMetric, classwise=True)]
    expected = r'^val_evaluator\.1: gives coco/bbox_mAP, which val_evaluator\.0 .*prefix='
    with pytest.raises(ConfigError, match=expected):
        preflight.check_data(cfg, 'val', model)
    with pytest.raises(ValueError, match='the same metric name'):
        evaluate(cfg)
    cfg.val_evaluator = [metric, dict(metric, prefix='second'), dict(metric, metric='proposal')]
    preflight.check_data(cfg, 'val', model)


@pytest.mark.parametrize(
    'best, meant',
    [
        ('coco/bbox_mAPP', 'coco/bbox_mAP'),
        ('bbox_mAP', 'coco/bbox_mAP'),
        (['coco/bbox_mAP', 'coco/mAP_50'], 'coco/bbox_mAP_50'),
        ('auto', None),
        (None, None),
        ('coco/bbox_mAP_s', None),
        ('coco/cat_precision', None),
    ],
)
def test_the_best_is_found_by_a_result_that_there_is(cfg, model, best, meant):
    cfg.default_hooks.checkpoint.save_best = best
    if meant is None:
        return preflight.check_data(cfg, 'val', model)
    preflight.check_data(cfg, 'test', model)
    expected = f"^default_hooks.checkpoint.save_best: the evaluator gives no .*'{meant}'"
    with pytest.raises(ConfigError, match=expected):
        preflight.check_data(cfg, 'val', model)
    cfg.val_evaluator = [cfg.val_evaluator, dict(type='VOCMetric')]  # whose names are not known
    preflight.check_data(cfg, 'val', model)


def without(cfg, key):
    pack = cfg.val_dataloader.dataset.pipeline[-1]
    pack.meta_keys = tuple(name for name in pack.meta_keys if name != key)


@pytest.mark.parametrize('key', ['img_id', 'ori_shape', 'scale_factor'])
def test_what_an_evaluation_needs_of_its_images_is_told(cfg, model, key):
    without(cfg, key)
    with pytest.raises(
        ConfigError, match=f'^val_dataloader.dataset.pipeline: expected {key}, .*meta_keys'
    ):
        preflight.check_data(cfg, 'val', model)


def test_images_that_are_not_resized_are_told(cfg, model):
    """mmdet's heads divide by the factor, also where it is 1."""
    del cfg.val_dataloader.dataset.pipeline[2]
    with pytest.raises(ConfigError, match='expected scale_factor, .*SSDLiteHead.* Add a Resize'):
        preflight.check_data(cfg, 'val', model)
    cfg.model.bbox_head = dict(
        type='CenterNetHead', num_classes=2, in_channels=96, feat_channels=8
    )
    preflight.check_data(cfg, 'val', preflight.check_model(cfg))


def test_masks_may_be_evaluated_where_a_model_finds_them(cfg, model, tmp_path):
    content = json.loads(Path(cfg.val_evaluator.ann_file).read_text())
    for annotation in content['annotations']:
        annotation['segmentation'] = [[4, 4, 20, 4, 20, 20]]
    path = tmp_path / 'masks.json'
    path.write_text(json.dumps(content))
    cfg.val_dataloader.dataset.ann_file = str(path)
    cfg.val_evaluator.update(ann_file=str(path), metric=['bbox', 'segm'])
    expected = "^val_evaluator.metric: expected 'bbox' for SingleStageDetector.* Leave 'segm' out"
    with pytest.raises(ConfigError, match=expected):
        preflight.check_data(cfg, 'val', model)
    finding = copy.deepcopy(model)
    finding.mask_head = nn.Identity()
    preflight.check_data(cfg, 'val', finding)
    preflight.check_data(cfg, 'val', nn.Identity())  # not mmdet's


def test_other_metrics_are_left_alone(cfg, model):
    """They have other results and arguments."""
    cfg.val_evaluator = [
        dict(type=LVISMetric, metric_items=['AP'], metric='segm', ann_file=None),
        dict(type='VOCMetric', iou_thrs=[0.5]),
    ]
    cfg.default_hooks.checkpoint.save_best = 'lvis/bbox_AP'
    preflight.check_data(cfg, 'val', model)


def test_training_data_without_boxes_are_told(cfg, model):
    del cfg.train_dataloader.dataset.pipeline[1]
    with pytest.raises(
        ConfigError, match=r'^train_dataloader\.dataset\.pipeline: expected boxes .*LoadAnnotat'
    ):
        preflight.check_data(cfg, 'train', model)


def test_pipelines_that_need_more_than_an_image_are_left_alone(cfg, model):
    inner = cfg.train_dataloader.dataset
    pipeline = inner.pipeline
    inner.pipeline = pipeline[:2]
    mosaic = dict(type='Mosaic', img_scale=(64, 64))
    cfg.train_dataloader.dataset = dict(
        type='MultiImageMixDataset', dataset=inner, pipeline=[mosaic, *pipeline[2:]]
    )
    preflight.check_data(cfg, 'train', model)
    inner.pipeline = [*pipeline[:2], mosaic, *pipeline[2:]]
    cfg.train_dataloader.dataset = inner
    preflight.check_data(cfg, 'train', model)
