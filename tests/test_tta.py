"""What --tta makes of a config: mmdet's own test-time augmentation."""

import copy

import pytest
from mmdet.datasets.transforms import PackDetInputs
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from tiny_detector import make_coco, write_config

from dn_mmdet.checks.preflight import ConfigError
from dn_mmdet.cli import tta
from dn_mmdet.cli.tta import augmented


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp('coco')
    make_coco(root)
    init_default_scope('mmdet')
    return Config.fromfile(write_config(root, 'DNB'))


@pytest.fixture
def cfg(original):
    return copy.deepcopy(original)


@pytest.fixture(autouse=True)
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(tta, 'tell', lines.append)
    return lines


def views(cfg):
    """Whether each view of the first test image is a mirror image."""
    sample = DATASETS.build(cfg.test_dataloader.dataset)[0]
    return [view.flip for view in sample['data_samples']]


@pytest.mark.parametrize('pack', ['PackDetInputs', 'mmdet.PackDetInputs', PackDetInputs])
def test_by_default_an_image_and_its_mirror_image(cfg, told, pack):
    before = cfg.to_dict()
    cfg.test_dataloader.dataset.pipeline[-1].type = pack
    made = augmented(cfg)
    assert sorted(views(made)) == [False, True]
    assert isinstance(MODELS.build(made.model), DetTTAModel)
    assert len(told) == 2 and 'no tta_model' in told[0] and 'no tta_pipeline' in told[1]
    cfg.test_dataloader.dataset.pipeline[-1].type = 'PackDetInputs'
    assert cfg.to_dict() == before


def test_the_fields_that_a_pipeline_packs_are_kept(cfg):
    cfg.test_dataloader.dataset.pipeline[-1].meta_keys = ('img_id', 'instances')
    *_, (pack,) = augmented(cfg).test_dataloader.dataset.pipeline[-1].transforms
    assert pack.meta_keys == ('img_id', 'instances', *tta.META_KEYS[1:])


def test_the_configs_own_come_first(cfg, told):
    flip = dict(type='RandomFlip', prob=1.0)
    cfg.tta_model = dict(
        type=DetTTAModel, tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.7), max_per_img=9)
    )
    before, pack = (
        cfg.test_dataloader.dataset.pipeline[:-1],
        dict(type='PackDetInputs', meta_keys=tta.META_KEYS),
    )
    cfg.tta_pipeline = [*before, dict(type='TestTimeAug', transforms=[[flip, flip, flip], [pack]])]
    made = augmented(cfg)
    assert views(made) == [True, True, True]
    assert made.model.tta_cfg.max_per_img == 9 and made.model.module == cfg.model
    assert not told


def test_wrapped_test_data_are_augmented_too(cfg):
    inner = cfg.test_dataloader.dataset
    cfg.test_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[inner, dict(type='RepeatDataset', times=1, dataset=inner)]
    )
    first, second = augmented(cfg).test_dataloader.dataset.datasets
    for dataset in (first, second.dataset):
        assert dataset.pipeline[-1].type == 'TestTimeAug'


@pytest.mark.parametrize(
    'pipeline, last', [([dict(type='mmdet.Resize', scale=(9, 9))], 'mmdet.Resize'), ([], 'None')]
)
def test_a_pipeline_of_another_kind_is_told(cfg, pipeline, last):
    cfg.test_dataloader.dataset.pipeline = pipeline
    with pytest.raises(
        ConfigError,
        match=f'^--tta: .*test_dataloader.dataset.pipeline ends in '
        f'{last}, where PackDetInputs .*Add a tta_pipeline',
    ):
        augmented(cfg)
