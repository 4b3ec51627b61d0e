"""The ONNX graph of a detector gives mmdet's detections, for any number of images."""

import copy
import importlib.util
import runpy
import tarfile
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from conftest import awake
from mmdet.datasets.transforms import Resize
from mmengine.hub import get_config
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS, init_default_scope
from test_convert import used
from tiny_detector import write_config

from dn_mmdet.checks import preflight
from dn_mmdet.cli import command_line
from dn_mmdet.convert import dn_layers, swap_norm
from dn_mmdet.deploy import export, export_heads, simplify
from dn_mmdet.fold import fold_norm, recalibrate

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / 'shared' / 'data' / 'coco_mini_320' / 'coco_mini_320.tar'
main = runpy.run_path(str(ROOT / 'tools' / 'export_onnx.py'))['main']
with_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in export.PACKAGES),
    reason="needs pip install -e '.[export]'",
)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def trained(model):
    """The model as if trained: its SC awake, its scores far enough apart to be ordered."""
    awake(used(model), 0.1)
    for name, parameter in model.bbox_head.named_parameters():
        if 'sc.' not in name and 'bn.' not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def ssdlite(tmp_path, norm='DNB'):
    return trained(MODELS.build(command_line.load_config(write_config(tmp_path, norm)).model))


def small(name, head, **options):
    """A detector of mmdet with DN-B, of few channels, three classes and random weights."""
    cfg = swap_norm(get_config(f'mmdet::{name}'), 'DNB').model
    if cfg.backbone.type == 'ResNet':
        cfg.backbone.update(init_cfg=None, depth=18, base_channels=8)
        cfg.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    else:
        cfg.backbone.update(init_cfg=None, widen_factor=0.125)
        cfg.neck.update(in_channels=[32, 64, 128], out_channels=16)
    if 'bbox_head' in cfg:
        cfg.bbox_head.update(in_channels=16, feat_channels=16, num_classes=3, **head)
    cfg.test_cfg.update(options)
    return cfg


def retinanet():
    return trained(
        MODELS.build(
            small('retinanet/retinanet_r18_fpn_1x_coco.py', {}, nms_pre=30, max_per_img=20)
        )
    )


def fcos():
    model = trained(
        MODELS.build(
            small(
                'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
                dict(norm_cfg=dict(type='DNB')),
                nms_pre=30,
                max_per_img=20,
            )
        )
    )
    torch.nn.init.normal_(model.bbox_head.conv_cls.weight, std=0.002)  # else many scores are 1
    return model


def rtmdet():
    return trained(
        MODELS.build(
            small('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', {}, nms_pre=30, max_per_img=20)
        )
    )


def yolox():
    """It takes pixels as they are, so that statistics of its own keep its maps small."""
    model = awake(used(MODELS.build(small('yolox/yolox_tiny_8xb8-300e_coco.py', {}))), 0.1)
    recalibrate(model, [export.batch_of(torch.from_numpy(pixels(8)))])
    head = model.bbox_head
    for conv in (
        *head.multi_level_conv_cls,
        *head.multi_level_conv_reg,
        *head.multi_level_conv_obj,
    ):  # sides are exp of what these give
        torch.nn.init.normal_(conv.weight, std=5e-4)
        torch.nn.init.zeros_(conv.bias)
    return model.eval()


def faster_rcnn():
    cfg = small('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', {})
    cfg.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.roi_head.bbox_roi_extractor.out_channels = 16
    cfg.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32, num_classes=3)
    cfg.test_cfg.rpn.update(nms_pre=50, max_per_img=30)
    cfg.test_cfg.rcnn.max_per_img = 20
    model = MODELS.build(cfg)
    for head in (model.rpn_head, model.roi_head.bbox_head):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return awake(used(model), 0.1).eval()


def gfl():
    """Its decoding is not written for ONNX."""
    return trained(
        MODELS.build(small('gfl/gfl_r50_fpn_1x_coco.py', dict(norm_cfg=dict(type='DNB'))))
    )


def pixels(number, size=64):
    return np.random.default_rng(0).integers(0, 256, (number, 3, size, size)).astype(np.float32)


def mmdets_own(detector, images):
    return export._mmdet_predictions(detector, torch.from_numpy(images))


@pytest.mark.parametrize('build', [ssdlite, retinanet, fcos, yolox, rtmdet, faster_rcnn])
def test_the_module_gives_mmdets_detections(build, tmp_path, close):
    detector = export.Detector(build(tmp_path) if build is ssdlite else build(), (64, 64))
    images = pixels(3)
    with torch.no_grad():
        boxes, scores, labels, *_ = detector(torch.from_numpy(images))
    limit = detector.head.cfg.get('max_per_img') or export_heads.UNLIMITED
    assert boxes.shape == (3, scores.shape[1], 4) and scores.shape[1] <= limit
    for index, sample in enumerate(mmdets_own(detector, images)):
        expected = sample.pred_instances
        number = len(expected.scores)
        assert number > 1
        close(scores[index, :number], expected.scores)
        close(boxes[index, :number], expected.bboxes, torch.float16)
        assert torch.equal(labels[index, :number], expected.labels)
        assert not scores[index, number:].any() and not boxes[index, number:].any()
        assert (labels[index, number:] == -1).all()


def test_pixels_are_normalised_as_the_detector_does(tmp_path, close):
    detector = export.Detector(ssdlite(tmp_path), (64, 64))
    preprocessor = detector.model.data_preprocessor
    assert preprocessor._channel_conversion and preprocessor._enable_normalize
    images = torch.from_numpy(pixels(1))
    inputs = preprocessor(dict(inputs=[images[0]], data_samples=None))['inputs']
    with torch.no_grad():
        scores = detector.model(inputs, mode='tensor')[0]
        close(detector.raw(images)[0], export_heads.flatten(scores, 3))


def test_suppression_is_by_class_and_limited():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]]])
    scores = torch.tensor([[[0.9, 0.8, 0.7], [0.1, 0.2, 0.0]]])
    kept = export_heads.non_max_suppression(boxes, scores, 0.5, 5)
    assert kept.tolist() == [[[1, 0, 1], [0, 1, 0]]]
    assert export_heads.non_max_suppression(boxes, scores, 0.95, 2)[0, 0].tolist() == [1, 1, 0]
    torch.library.opcheck(export_heads.non_max_suppression, (boxes, scores, 0.5, 5))


def test_the_batch_norm_twin_is_the_same_detector_without_sc(tmp_path, close):
    cfg = command_line.load_config(write_config(tmp_path, 'DNB'))
    model = used(MODELS.build(cfg.model)).eval()
    x = torch.randn(1, 3, 64, 64)
    twin = export.folded_twin(model)
    assert not dn_layers(twin) and dn_layers(model)
    with torch.no_grad():
        for got, expected in zip(
            twin(x, mode='tensor')[0], model(x, mode='tensor')[0], strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def assert_exact(detector, images, found):
    """Raw outputs are off float64 by 1e-5 of their range at most, or twice what PyTorch is.

    YOLOX takes pixels of 0 to 255 as they are: its maps cost float32 some digits everywhere.
    """
    plain = dict(zip(detector.raw_names, detector.raw(images), strict=True))
    exact = copy.deepcopy(detector).double().raw(images.double())
    exact = dict(zip(detector.raw_names, exact, strict=True))
    for name in detector.head.FIRST:
        wanted = exact[name].numpy()
        allowed = max(1e-5, 2 * export.difference(plain[name].numpy(), wanted))
        assert export.difference(found[name], wanted) < allowed < 1e-4, name


@pytest.mark.parametrize('target', simplify.TARGETS)
@pytest.mark.parametrize('build', [ssdlite, retinanet, fcos, yolox, rtmdet, faster_rcnn, gfl])
def test_simplified_it_gives_the_same_raw_outputs(build, target, tmp_path):
    detector = export.Detector(build(tmp_path) if build is ssdlite else build(), (64, 64))
    images = torch.from_numpy(pixels(1))
    simple = simplify.simplified(detector, torch.zeros(1, 3, 64, 64), target)
    assert not simple.left and simple.dynamic == [
        name for name, _ in detector.named_modules() if name in dn_layers(detector)
    ]
    with torch.no_grad():
        raw = [t.numpy() for t in simple.model.raw(images)]
    assert_exact(detector, images, dict(zip(detector.raw_names, raw, strict=True)))


@pytest.mark.shows('ONNX')
@with_extra
@pytest.mark.slow
@pytest.mark.parametrize('build', [ssdlite, retinanet, fcos, yolox, rtmdet, faster_rcnn])
def test_onnxruntime_agrees_for_any_number_of_images(build, tmp_path):
    detector = export.Detector(build(tmp_path) if build is ssdlite else build(), (64, 64))
    export.export(detector, tmp_path / 'whole.onnx')
    count = export.operators(tmp_path / 'whole.onnx')
    assert not {'BatchNormalization', 'ReduceSumSquare'} & set(count)
    own_pools = sum(isinstance(m, torch.nn.AdaptiveAvgPool2d) for m in detector.modules())
    assert count.get('ReduceMean', 0) == own_pools  # of RTMDet's channel attention
    assert count['GlobalAveragePool'] >= 2 * len(dn_layers(detector.model))
    session = export.open_session(tmp_path / 'whole.onnx')
    for number in (1, 2, 3):
        images = pixels(number)
        agreement = export.compare(session, detector, images)
        assert_exact(detector, torch.from_numpy(images), export.run(session, images))
        # In SSDLite's third image two scores of a class are 3e-8 apart, and roundings decide
        # which of the two suppresses the other.
        if number < 3 or build is retinanet:
            assert agreement.matched == agreement.detections > number
    export.keep_outputs(tmp_path / 'whole.onnx', tmp_path / 'detector.onnx')
    session = export.open_session(tmp_path / 'detector.onnx')
    assert [output.name for output in session.get_outputs()] == list(export.OUTPUTS)
    boxes, scores, labels = session.run(None, dict(images=pixels(2)))
    assert boxes.shape == (*scores.shape, 4) and labels.shape == scores.shape
    assert labels.dtype == np.int64 and (np.diff(scores) <= 0).all()
    export.keep_outputs(tmp_path / 'whole.onnx', tmp_path / 'raw.onnx', detector.raw_names)
    if build is not faster_rcnn:  # which suppresses on its way
        assert 'NonMaxSuppression' not in export.operators(tmp_path / 'raw.onnx')


@with_extra
@pytest.mark.slow
@pytest.mark.parametrize('build', [ssdlite, faster_rcnn, gfl])
def test_onnxruntime_agrees_with_what_is_written_for_it(build, tmp_path):
    detector = export.Detector(build(tmp_path) if build is ssdlite else build(), (64, 64))
    export.export(detector, tmp_path / 'whole.onnx', 'onnxruntime')
    session = export.open_session(tmp_path / 'whole.onnx')
    assert session.get_inputs()[0].shape[0] == 1
    agreement = export.compare(session, detector, pixels(2))
    assert agreement.raw < 1e-5 and agreement.matched == agreement.detections
    assert bool(agreement.detections) == (build is not gfl)


@with_extra
@pytest.mark.slow
@pytest.mark.parametrize('keep', [0, 20])
def test_folded_and_partly_folded_models_are_exported_too(keep, tmp_path):
    model = ssdlite(tmp_path)
    report = fold_norm(model, [export.batch_of(torch.from_numpy(pixels(8)))], keep=keep)
    detector = export.Detector(model, (64, 64))
    simple = export.export(detector, tmp_path / 'whole.onnx')
    assert len(simple.dynamic) == keep and len(simple.folded) == len(report) - keep
    assert not simple.left
    agreement = export.compare(export.open_session(tmp_path / 'whole.onnx'), detector, pixels(2))
    assert agreement.raw < 1e-5 and agreement.matched == agreement.detections
    count = export.operators(tmp_path / 'whole.onnx')
    assert count.get('GlobalAveragePool', 0) == 2 * keep and 'BatchNormalization' not in count


@with_extra
@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason=f'needs the images in {SHARED}')
def test_a_full_size_detector_on_real_images(tmp_path, capsys):
    """SSDLite at 320 px, by the tool, with latencies."""
    with tarfile.open(SHARED) as tar:
        for member in [m for m in tar if m.name.endswith('.jpg')][:4]:
            member.name = Path(member.name).name
            tar.extract(member, tmp_path / 'images', filter='data')
    config = ROOT / 'configs' / 'ssdlite_mbv2_dnb_coco.py'
    model = trained(MODELS.build(command_line.load_config(config).model))
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'dnb.pth')
    main(
        [str(config), str(tmp_path / 'dnb.pth'), '--images', str(tmp_path / 'images'), '--latency']
    )
    printed = capsys.readouterr().out
    assert 'onnxruntime against mmdet on 4 images' in printed
    assert 'BN, folded: ' in printed and 'this detector: ' in printed
    session = export.open_session(tmp_path / 'dnb.onnx')
    images = export.read_images(sorted((tmp_path / 'images').iterdir()), (320, 320))
    scores = session.run(None, dict(images=images))[1]
    assert scores.shape == (4, 200) and scores.any(1).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['dnb.onnx', 'dnb.pth', 'images']


def refused(tmp_path, capsys, *argv):
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in argv])
    assert ended.value.code == 2 and sorted(tmp_path.rglob('*')) == before
    return capsys.readouterr().err


def test_without_the_extra_it_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, 'PACKAGES', ('onnx_of_nobody',))
    message = refused(tmp_path, capsys, 'no_config.py', 'no_checkpoint.pth')
    assert 'needs onnx_of_nobody, not installed here: in a clone' in message
    assert "pip install --no-build-isolation -e '.[export]'" in message


@with_extra
def test_weights_of_another_detector_are_refused(tmp_path, capsys):
    config = write_config(tmp_path, 'DNB')
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / 'other.pth')
    assert 'not of the model' in refused(tmp_path, capsys, config, tmp_path / 'other.pth')


@with_extra
def test_no_file_is_replaced(tmp_path, capsys):
    checkpoint, earlier = tmp_path / 'dnb.pth', tmp_path / 'dnb.onnx'
    for path in (checkpoint, earlier):
        path.write_text('mine')
    config = write_config(tmp_path, 'DNB')
    message = refused(tmp_path, capsys, config, checkpoint, '--out', checkpoint)
    assert '--out: expected a file name in .onnx' in message
    assert 'dnb.onnx: exists already' in refused(tmp_path, capsys, config, checkpoint)
    assert checkpoint.read_text() == earlier.read_text() == 'mine'


def test_other_detectors_and_sizes_are_refused(tmp_path):
    cfg = get_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py').model
    cfg.backbone.update(init_cfg=None, base_channels=8)
    cfg.neck.in_channels = [32, 64, 128, 256]
    with pytest.raises(preflight.ConfigError, match='without masks, got MaskRCNN'):
        export.Detector(MODELS.build(cfg), (64, 64))
    cfg = get_config('mmdet::detr/detr_r50_8xb2-150e_coco.py').model
    cfg.backbone.init_cfg = None
    with pytest.raises(preflight.ConfigError, match='single-stage detector.*got DETR'):
        export.Detector(MODELS.build(cfg), (64, 64))
    model = retinanet()
    with pytest.raises(preflight.ConfigError, match='expected multiples of 32.*got .64, 70.'):
        export.Detector(model, (64, 70))
    model.bbox_head.test_cfg.nms.type = 'soft_nms'
    with pytest.raises(preflight.ConfigError, match="expected type='nms'"):
        export.Detector(model, (64, 64))


def test_images_come_as_the_graph_takes_them(tmp_path):
    image = np.zeros((4, 8, 3), np.uint8)
    image[..., 0] = 200  # blue
    mmcv.imwrite(image, str(tmp_path / 'a.png'))
    images = export.read_images([tmp_path / 'a.png'], (16, 12))
    assert images.shape == (1, 3, 16, 12) and images.dtype == np.float32
    assert (images[0, 0] == 200).all() and not images[0, 1:].any()


def test_the_size_is_that_of_the_test_pipeline():
    image_size = main.__globals__['image_size']
    cfg = command_line.load_config(ROOT / 'configs' / 'ssdlite_mbv2_dnb_coco.py')
    assert image_size(cfg, None) == (320, 320) and image_size(cfg, [64, 96]) == (64, 96)
    dataset = cfg.test_dataloader.dataset
    for kind in ('mmdet.Resize', 'mmcv.Resize', Resize):
        resize = next(step for step in dataset.pipeline if 'scale' in step)
        resize.type = kind
        assert image_size(cfg, None) == (320, 320)
    cfg.test_dataloader.dataset = dict(type='RepeatDataset', times=1, dataset=dataset)
    assert image_size(cfg, None) == (320, 320)
    resize.scale = 320  # both sides
    assert image_size(cfg, None) == (320, 320)
    for without in ({}, dict(test_dataloader=None)):
        with pytest.raises(preflight.ConfigError, match='give the size'):
            image_size(without, None)


def test_latency_is_of_each_run_after_the_warm_up():

    class Session:
        calls = 0

        def get_inputs(self):
            return [type('Input', (), dict(name='images'))]

        def run(self, outputs, feed):
            assert feed['images'].shape[0] == 1
            self.calls += 1

    session = Session()
    assert len(export.latency(session, pixels(2), runs=4, warm_up=2)) == 4
    assert session.calls == 6


@pytest.mark.parametrize(
    'options, expected',
    [
        (dict(max_num=3), r"model.test_cfg.nms: expected type='nms'.*no other option.*max_num"),
        (dict(score_threshold=0.5), 'test_cfg.nms: .*score_threshold'),
        (dict(offset=1), 'test_cfg.nms: .*offset'),
        (dict(class_agnostic=True), 'test_cfg.nms'),
        (dict(iou_threshold=None), 'test_cfg.nms'),
    ],
    ids=str,
)
def test_options_of_the_suppression_that_the_graph_has_not_are_refused(options, expected):
    model = retinanet()
    model.bbox_head.test_cfg.nms.update(max_num=-1, offset=0, class_agnostic=False)  # defaults
    export.Detector(model, (64, 64))
    model.bbox_head.test_cfg.nms.update(options)
    if options == dict(iou_threshold=None):
        del model.bbox_head.test_cfg.nms['iou_threshold']
    with pytest.raises(preflight.ConfigError, match=expected):
        export.Detector(model, (64, 64))
    assert not export.Detector(model, (64, 64), raw=True).outputs  # which need none


def test_no_suppression_and_no_limit_are_refused():
    model = retinanet()
    model.bbox_head.test_cfg.nms = None
    with pytest.raises(preflight.ConfigError, match="test_cfg.nms: expected type='nms'"):
        export.Detector(model, (64, 64))
    model = retinanet()
    model.bbox_head.test_cfg.max_per_img = None  # mmdet's for all
    export.Detector(model, (64, 64))
    model.bbox_head.test_cfg.max_per_img = -1
    with pytest.raises(preflight.ConfigError, match='max_per_img: expected at least 1, got -1'):
        export.Detector(model, (64, 64))


def test_a_detector_without_mmdets_preprocessor_is_refused():
    model = retinanet()
    model.data_preprocessor = BaseDataPreprocessor()
    with pytest.raises(preflight.ConfigError, match='expected a DetDataPreprocessor'):
        export.Detector(model, (64, 64))


def test_images_that_cannot_be_read_are_named(tmp_path):
    for name, content in (('empty.png', b''), ('broken.jpg', b'no picture')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(preflight.ConfigError, match=f'{name}: cannot be read as an image'):
            export.read_images([tmp_path / name], (64, 64))


def test_outputs_that_are_no_numbers_do_not_agree():
    right, wrong = np.ones(2), np.array([1.0, np.nan])
    pairs = (right, right), (wrong, right)
    assert max(export.difference(*pair) for pair in pairs) == float('inf')
    assert max(export.difference(*pair) for pair in pairs[::-1]) == float('inf')
    assert export.difference(right, right) == 0


@pytest.mark.parametrize(
    'agreement, bad',
    [
        (export.Agreement(0, 10, 10, 0), False),
        (export.Agreement(0, 9, 10, 1), False),  # a rounding
        (export.Agreement(0, 0, 0, 0), False),
        (export.Agreement(0, 0, 10, 0), True),
        (export.Agreement(0, 6, 6, 134), True),
        (export.Agreement(0, 0, 0, 3), True),
        (export.Agreement(0, 64, 100, 36), False),
        (export.Agreement(0, 1, 2, 1), False),
    ],
)
def test_detections_that_only_one_side_gives_count(agreement, bad):
    assert agreement.is_bad() is bad
