"""Each rule of COCO files, by a file that breaks it, and what mmdet and pycocotools make of it."""

import copy
import json
import re

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import area, encode

from dn_mmdet.checks import coco
from dn_mmdet.checks.coco import CocoError

CLASSES = ('kite', 'vase')
NAN, INFINITE = float('nan'), float('inf')


def make(boxes=((4, 6, 20, 30), (10, 20, 8, 9), (30, 2, 30, 60))):
    """Three images of 64 x 64 with a box each, of both classes in turn."""
    return dict(
        images=[dict(id=i, file_name=f'{i}.png', width=64, height=64) for i in range(len(boxes))],
        annotations=[
            dict(
                id=i + 1,
                image_id=i,
                category_id=(7, 3)[i % 2],
                iscrowd=0,
                bbox=list(box),
                area=box[2] * box[3],
            )
            for i, box in enumerate(boxes)
        ],
        categories=[dict(id=7, name='kite'), dict(id=3, name='vase'), dict(id=9, name='cup')],
    )


@pytest.fixture
def content():
    return make()


def check_all(content):
    coco.check_format(content)
    coco.check_labels(content, CLASSES)
    coco.check_evaluation(content, CLASSES)


def test_a_right_file_passes(content):
    check_all(content)


@pytest.mark.parametrize(
    'part, ids',
    [('images', ['a', 'b', 'c']), ('images', [-1, 0, 2**62]), ('annotations', [5.0, 6.0, 7.0])],
)
def test_ids_may_be_texts_whole_floats_and_far_apart(part, ids):
    """pycocotools finds boxes by them all the same."""
    content = make()
    for entry, number in zip(content[part], ids, strict=True):
        entry['id'] = number
    for annotation, image in zip(content['annotations'], content['images'], strict=True):
        annotation['image_id'] = image['id']
    check_all(content)


@pytest.mark.parametrize('part', list(coco.KEYS))
@pytest.mark.parametrize('number', [None, True, [1], {}, 1.5, NAN, INFINITE, 2**63])
def test_what_cannot_be_an_id_is_told(content, part, number):
    content[part][1]['id'] = number
    with pytest.raises(CocoError, match=f'^{part}: number 1 has the id .*expected a whole number'):
        coco.check_format(content)


@pytest.mark.parametrize('part', list(coco.KEYS))
def test_an_id_that_comes_twice_is_told(content, part):
    content[part][2]['id'] = content[part][0]['id']
    with pytest.raises(CocoError, match=f'^{part}: numbers 0 and 2 both have the id'):
        coco.check_format(content)


@pytest.mark.parametrize('part', list(coco.KEYS))
def test_ids_of_two_kinds_are_told(content, part):
    content[part][2]['id'] = 'c'
    with pytest.raises(CocoError, match=f'^{part}: some ids are numbers and some are texts'):
        coco.check_format(content)


@pytest.mark.parametrize('field', ['height', 'width'])
@pytest.mark.parametrize('value', [0, -1, None, '64', NAN, [64]])
def test_a_size_that_is_none_is_told(content, field, value):
    content['images'][2][field] = value
    with pytest.raises(CocoError, match=r'^images: number 2 \(id 2\) has the height .* 2.png'):
        coco.check_format(content)


@pytest.mark.parametrize('name', [None, '', 3, ['a.png']])
def test_a_file_name_that_is_none_is_told(content, name):
    content['images'][0]['file_name'] = name
    with pytest.raises(CocoError, match='^images: number 0 .*file_name'):
        coco.check_format(content)


@pytest.mark.parametrize(
    'box',
    [
        [],
        None,
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        '1234',
        {'x': 1},
        [1, 2, 3, None],
        [1, 2, '3', 4],
        [NAN, 2, 3, 4],
        [1, 2, INFINITE, 4],
        [True, 2, 3, 4],
    ],
)
def test_a_box_that_is_none_is_told(content, box):
    content['annotations'][1]['bbox'] = box
    with pytest.raises(CocoError, match=r'^annotations: number 1 \(id 2\) has the bbox .*x, y, w'):
        coco.check_format(content)


@pytest.mark.parametrize('box', [[9, 9, -3, 4], [9, 9, 3, -4]])
def test_a_negative_width_or_height_is_told(content, box):
    content['annotations'][1]['bbox'] = box
    with pytest.raises(CocoError, match=r'^annotations: number 1 .*not negative'):
        coco.check_format(content)


@pytest.mark.parametrize('area', [None, '12', NAN, INFINITE, -3, [4]])
def test_an_area_that_is_none_is_told(content, area):
    content['annotations'][0]['area'] = area
    with pytest.raises(CocoError, match=r'^annotations: number 0 .* has the area .*width \* h'):
        coco.check_format(content)


@pytest.mark.parametrize('crowd', ['0', '1', 2, -1, [0], NAN, 'no'])
def test_a_crowd_flag_that_is_none_is_told(content, crowd):
    """mmdet takes the text '0' for a crowd."""
    content['annotations'][0]['iscrowd'] = crowd
    with pytest.raises(CocoError, match=r'^annotations: number 0 .*iscrowd .*expected 0, or 1'):
        coco.check_format(content)


@pytest.mark.parametrize('crowd', [0, 1, False, True, 0.0, 1.0, None])
def test_crowd_flags_of_all_kinds_pass(content, crowd):
    content['annotations'][0]['iscrowd'] = crowd
    coco.check_format(content)


@pytest.mark.parametrize('number', [0, '7', None, [7]])
def test_a_category_that_is_not_there_is_told(content, number):
    """As where categories count from 1 and annotations from 0: mmdet drops such boxes."""
    content['annotations'][2]['category_id'] = number
    with pytest.raises(CocoError, match=r'^annotations: number 2 \(id 3\) has the .*category_id'):
        coco.check_format(content)


def test_annotations_of_none_of_the_images_are_told(content):
    for annotation in content['annotations']:
        annotation['image_id'] = str(annotation['image_id'])
    with pytest.raises(CocoError, match="^annotations: none of 3 has the image_id .*'0'"):
        coco.check_format(content)


def test_annotations_of_some_other_images_pass(content):
    """As in a file whose images are a part; nobody reads them."""
    content['annotations'][2].update(image_id=77, category_id=77)
    coco.check_format(content)
    assert [len(found) for found in coco.sort_boxes(content, CLASSES).values()] == [2, 1]


def test_corners_are_told():
    places = np.random.default_rng(0).integers(0, 39, (20, 2)).tolist()
    boxes = [(x, y, x + 25, y + 20) for x, y in places]
    with pytest.raises(CocoError, match='of 20 boxes reach out .*x2 and y2'):
        coco.check_format(make(boxes))
    coco.check_format(make([(x, y, 25, 20) for x, y, _, _ in boxes]))


def test_shares_of_the_image_are_told():
    with pytest.raises(CocoError, match='all 2 boxes lie within one pixel.*shares'):
        coco.check_format(make([(0.1, 0.2, 0.3, 0.4), (0, 0, 1.0, 1.0)]))


def test_boxes_that_reach_out_by_more_than_rounding_are_found():
    boxes = [(0, 0, 64, 64), (-0.5, 0, 65, 64.9), (40, 3, 26, 9), (-2, 3, 9, 9)]
    content = make(boxes)
    coco.check_format(content)
    assert [found['id'] for found in coco.boxes_reaching_out(content)] == [3, 4]


def test_a_class_that_is_not_there_is_told(content):
    with pytest.raises(
        CocoError,
        match=r'has 3 classes \(kite, vase, cup\). Of the 2 that are expected, kit, .* missing. '
        'Set OPTION',
    ):
        coco.check_labels(content, ('kit', 'vas'), 'OPTION')


def test_classes_in_another_order_than_the_categories_are_told(content):
    with pytest.raises(
        CocoError,
        match='order kite, vase, but OPTION has the order vase, kite.*kite would be taken '
        'for vase',
    ):
        coco.check_labels(content, ('vase', 'kite'), 'OPTION')
    coco.check_labels(content, ['kite', 'cup'])  # a part of them is a choice
    with pytest.raises(CocoError, match='kite would be taken for cup'):
        coco.check_labels(content, ('cup', 'kite'))


def test_categories_may_be_sorted_by_their_reader(content):
    coco.check_labels(content, ('vase', 'kite'), sort=True)
    with pytest.raises(CocoError, match='the file has the order'):
        coco.check_labels(content, ('kite', 'vase'), sort=True)


def test_two_categories_of_one_name_are_told(content):
    """As files of some labelling tools begin with a category for all."""
    content['categories'].insert(0, dict(id=1, name='kite'))
    with pytest.raises(
        CocoError,
        match=r"2 have the name 'kite' \(id 1 with 0 boxes, id 7 with "
        r'2 boxes\)',
    ):
        coco.check_labels(content, CLASSES)
    coco.check_labels(content, ('vase', 'cup'))  # of no class that is asked for


def labels_of_mmdet(content, classes, folder):
    path = folder / 'file.json'
    path.write_text(json.dumps(content))
    dataset = CocoDataset(
        str(path),
        metainfo=dict(classes=classes),
        data_prefix=dict(img=''),
        test_mode=True,
        serialize_data=False,
    )
    return [instance['bbox_label'] for info in dataset.data_list for instance in info['instances']]


@pytest.mark.parametrize(
    'change',
    [
        lambda content: content['categories'].reverse(),
        lambda content: content['categories'].insert(0, dict(id=1, name='kite')),
    ],
    ids=['order', 'name'],
)
def test_mmdet_numbers_the_labels_of_such_files_otherwise(content, change, tmp_path):
    """Why they are refused: this is what would be trained."""
    assert labels_of_mmdet(content, CLASSES, tmp_path) == [0, 1, 0]
    change(content)
    assert labels_of_mmdet(content, CLASSES, tmp_path) != [0, 1, 0]


@pytest.mark.parametrize('number', [0, 0.0, 'a', '5'])
def test_an_id_that_pycocotools_takes_for_no_match_is_told(content, number):
    content['annotations'] = content['annotations'][:1]
    content['annotations'][0]['id'] = number
    coco.check_format(content)  # training may
    with pytest.raises(CocoError, match='^annotations: one has the id .*"no match"'):
        coco.check_evaluation(content, CLASSES)


def ap(content, found=None):
    """Of detections that are the ground truth, or a part of it."""
    truth = COCO()
    truth.dataset = copy.deepcopy(content)
    truth.createIndex()
    found = truth.loadRes(
        [
            dict(image_id=a['image_id'], category_id=a['category_id'], bbox=a['bbox'], score=0.9)
            for a in found or content['annotations']
        ]
    )
    evaluation = COCOeval(truth, found, 'bbox')
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        step()
    return evaluation.stats[0]


def test_pycocotools_takes_the_id_0_for_no_match(content):
    """Why it is refused, and -1 is not."""
    assert ap(content) == pytest.approx(1)
    content['annotations'][0]['id'] = -1
    check_all(content)
    assert ap(content) == pytest.approx(1)
    content['annotations'][0]['id'] = 0
    assert ap(content) < 0.9


@pytest.mark.parametrize(
    'change',
    [
        lambda annotation: annotation.pop('iscrowd'),
        lambda annotation: annotation.update(iscrowd=None),
    ],
    ids=['absent', 'null'],
)
def test_evaluation_needs_iscrowd_and_training_does_not(content, change):
    change(content['annotations'][2])
    coco.check_format(content)
    assert len(coco.sort_boxes(content, CLASSES)[coco.TRAINED]) == 3
    with pytest.raises(CocoError, match='^annotations: id 3 has no iscrowd'):
        coco.check_evaluation(content, CLASSES)
    content['annotations'][2]['category_id'] = 9  # of no class: pycocotools does not ask
    coco.check_evaluation(content, CLASSES)


@pytest.mark.parametrize(
    'change',
    [dict(iscrowd=1), dict(category_id=9), dict(image_id=77)],
    ids=['crowds', 'classes', 'images'],
)
def test_nothing_to_compare_with_is_told(content, change):
    for annotation in content['annotations']:
        annotation.update(change)
    with pytest.raises(CocoError, match='^has no box of kite, vase to compare with: of 3 .*AP'):
        coco.check_evaluation(content, CLASSES)


def test_masks_are_asked_for_where_they_are_evaluated(content):
    for annotation in content['annotations'][:2]:
        annotation['segmentation'] = [[0, 0, 9, 0, 9, 9]]
    coco.check_evaluation(content, CLASSES)
    for empty in (None, [], {}):
        content['annotations'][2]['segmentation'] = empty
        with pytest.raises(CocoError, match='^annotations: id 3 has no segmentation'):
            coco.check_evaluation(content, CLASSES, masks=True)


@pytest.mark.parametrize(
    'mask',
    [
        [[0, 0, 9, 9]],
        [[0, 0, 9, 0, 9]],
        [0, 0, 9, 0, 9, 9],
        [['0', 0, 9, 0, 9, 9]],
        'abc',
        dict(counts=[4]),
        [[0, 0, 9, 0, 9, 9], 'x'],
        [[0, 0, 9, 0, 9, 9], None],
        [[0, 0, 9, 0, 9, 9], [1, 2, 3, 4, 5]],
        [[0, 0, 9, 0, 9, 9], [[1, 2], [3, 4], [5, 6]]],
        [[0, 0, 9, 0, 9, 9], [1, 2, 3, 4, 5, NAN]],
        [[0, 0, 9, 0, 9, 9], [INFINITE, 2, 3, 4, 5, 6]],
        [[0, 0, 9, 0, 9, 9], [True, 2, 3, 4, 5, 6]],
    ],
    ids=str,
)
def test_a_mask_that_is_none_is_told(content, mask):
    content['annotations'][0]['segmentation'] = mask
    with pytest.raises(CocoError, match='^annotations: id 1 has the segmentation .*Write poly'):
        coco.check_masks(content['annotations'])


def test_pycocotools_cannot_read_a_polygon_of_two_points(content):
    file = COCO()
    file.dataset = content
    content['annotations'][0]['segmentation'] = [[0, 0, 9, 9]]
    file.createIndex()
    with pytest.raises(TypeError):
        file.annToMask(content['annotations'][0])


@pytest.mark.parametrize(
    'mask',
    [[[0, 0, 9, 0, 9, 9]], [[0, 0, 9, 0, 9, 9.5], [1, 1]], dict(counts=[4], size=[2, 2])],
    ids=str,
)
def test_masks_of_all_kinds_pass(content, mask):
    for annotation in content['annotations']:
        annotation['segmentation'] = mask
    coco.check_masks(content['annotations'])


def masked(content, *masks):
    """Annotations with masks, the last for all that are left; and the sizes of their images."""
    for index, annotation in enumerate(content['annotations']):
        annotation['segmentation'] = masks[min(index, len(masks) - 1)]
    return content['annotations'], coco.sizes_of(content)


SQUARE = [[4, 4, 20, 4, 20, 20, 4, 20]]
PIXELS = 64 * 64


def encoded(size=(64, 64), part=np.s_[4:20, 10:30]):
    """A mask of run lengths as a text, as pycocotools writes it."""
    pixels = np.zeros(size, np.uint8, order='F')
    pixels[part] = 1
    mask = encode(pixels)
    return dict(size=mask['size'], counts=mask['counts'].decode())


@pytest.mark.parametrize(
    'mask, expected',
    [
        (dict(encoded((128, 128))), 'has the height 64 and the width 64: expected size='),
        (dict(encoded(), size=[32, 128]), 'size [32, 128], and its image'),
        (dict(size=[128, 32], counts=[PIXELS]), 'size [128, 32], and its image'),
        (dict(size=[64], counts=[PIXELS]), 'size [64], and its image'),
        (dict(size=None, counts=[PIXELS]), 'size None, and its image'),
        (dict(size=[64, '64'], counts=[PIXELS]), "size [64, '64'], and its image"),
        (dict(size=[64, 64], counts=[600, 10]), 'add up to 610 pixels: expected .* = 4096'),
        (dict(size=[64, 64], counts=[600, 4 * PIXELS]), 'add up to 16984 pixels'),
        (dict(size=[64, 64], counts=[600, -10, PIXELS - 590]), 'counts [600, -10, 3506]'),
        (dict(size=[64, 64], counts=[600.5, PIXELS - 600.5]), 'counts [600.5, 3495.5]'),
        (dict(size=[64, 64], counts=[]), 'counts []: expected a list of run lengths'),
        (dict(size=[64, 64], counts=None), 'counts None: expected a list of run lengths'),
        (dict(size=[64, 64], counts=''), 'counts : expected a list'),
        (dict(size=[64, 64], counts='hello world'), 'counts hello world: expected'),
        (dict(size=[64, 64], counts='123'), 'add up to 6 pixels'),
        (dict(size=[64, 64], counts=encoded()['counts'][:-1]), 'counts|add up to'),
        (dict(size=[64, 64], counts='o' * 40 + '0'), 'counts ooo'),
        (dict(size=[64, 64], counts='\u20ac'), 'counts \u20ac'),
    ],
    ids=str,
)
def test_run_lengths_of_other_pixels_are_told(content, mask, expected):
    annotations, sizes = masked(content, SQUARE, mask)
    expected = re.sub(r'[][]', r'\\\g<0>', expected)
    with pytest.raises(CocoError, match=f'^annotations: id 2 has a mask .*{expected}'):
        coco.check_masks(annotations, sizes)


def test_run_lengths_are_read_as_pycocotools_does():
    """Of masks with pixels at both ends, with long runs and with none."""
    rng = np.random.default_rng(0)
    for pixels in (
        np.ones((3, 5)),
        np.zeros((300, 400)),
        rng.integers(0, 2, (31, 17)),
        rng.random((300, 400)) > 0.999,
        np.tri(200, 500),
    ):
        mask = encode(np.asfortranarray(pixels, np.uint8))
        flat = pixels.T.flatten().astype(bool)
        edges = np.flatnonzero(np.diff(flat, prepend=False, append=~flat[-1]))
        expected = np.diff(edges, prepend=0)
        assert coco._runs(mask['counts'].decode()).tolist() == expected.tolist()
        assert coco._runs(expected.tolist()).tolist() == expected.tolist()


def test_run_lengths_of_too_few_pixels_are_read_from_memory():
    """Why they are refused: pycocotools leaves the rest of a mask as it finds it."""
    with pytest.raises(CocoError, match='uninitialised memory'):
        coco.check_masks([dict(id=1, segmentation=dict(size=[64, 64], counts=[600, 10]))])


NO_PIXEL = {
    'beside': [[80, 4, 90, 4, 90, 9]],
    'above': [[4, -9, 9, -9, 9, -4]],
    'point': [[5, 5, 5, 5, 5, 5]],
    'line': [[5, 5, 5, 30, 5, 9]],
    'both': [[5, 5, 9, 5, 30, 5], [80, 4, 90, 4, 90, 9]],
    'runs': dict(size=[64, 64], counts=[PIXELS]),
}


@pytest.mark.parametrize('mask', NO_PIXEL.values(), ids=NO_PIXEL)
def test_masks_without_a_pixel_are_found(content, mask):
    annotations, sizes = masked(content, SQUARE, mask, encoded())
    assert coco.check_masks(annotations, sizes) == {coco.NO_PIXEL: annotations[1:2]}
    with pytest.raises(CocoError, match='all 3 segmentations have no area .*id 1'):
        coco.check_masks(*masked(content, mask))
    file = COCO()
    file.dataset = content
    file.createIndex()
    assert area(file.annToRLE(annotations[1])) == 0


def test_parts_that_mmdet_leaves_out_are_found(content):
    annotations, sizes = masked(content, [*SQUARE, [1, 1]], [*SQUARE, []], SQUARE * 2)
    assert coco.check_masks(annotations, sizes) == {coco.SHORT_PARTS: annotations[:2]}


def test_polygons_in_shares_of_the_image_are_told(content):
    shares = [[0.1, 0.1, 0.5, 0.1, 0.5, 1]]
    with pytest.raises(CocoError, match='all 3 segmentations lie within one pixel.*Multiply'):
        coco.check_masks(*masked(content, shares))
    coco.check_masks(*masked(content, shares, SQUARE))
    coco.check_masks(*masked(content, shares, encoded()))


@pytest.mark.parametrize('box', [[9, 9, 0, 4], [9, 9, 4, 0], [64, 0, 4, 4], [-9, 0, 9, 4]])
def test_boxes_that_no_detection_can_match(content, box):
    assert coco.never_found(content, CLASSES) == []
    content['annotations'][0]['bbox'] = box
    assert coco.never_found(content, CLASSES) == content['annotations'][:1]
    coco.check_evaluation(content, CLASSES)
    for annotation in content['annotations']:
        annotation['bbox'] = box
    with pytest.raises(CocoError, match='all 3 boxes of kite, vase have no size.*id 1, is .*AP'):
        coco.check_evaluation(content, CLASSES)


@pytest.mark.parametrize('mark', ['false', 'no', '', 2, -1, [], [1], NAN])
def test_a_mark_that_is_none_is_told(content, mark):
    """mmdet leaves out what is marked with any text, also with 'false'."""
    content['annotations'][1]['ignore'] = mark
    with pytest.raises(
        CocoError, match=r'^annotations: number 1 \(id 2\) has ignore .*expected 0'
    ):
        coco.check_format(content)


@pytest.mark.parametrize('mark', [None, 0, 1, False, True, 0.0, 1.0])
def test_marks_of_all_kinds_pass(content, mark):
    content['annotations'][1]['ignore'] = mark
    check_all(content)
    marked = content['annotations'][1:2] if mark else []
    assert coco.marked_ignore(content, CLASSES) == marked
    content['annotations'][1]['iscrowd'] = 1
    assert coco.marked_ignore(content, CLASSES) == []


def test_pycocotools_wants_found_what_mmdet_ignores(content):
    """Why it is told."""
    content['annotations'][0]['ignore'] = 1
    everything = copy.deepcopy(content)
    assert ap(content) == pytest.approx(1)
    content['annotations'].pop(0)
    assert ap(everything, found=content['annotations']) < 0.9


def test_areas_larger_than_their_image_are_found(content):
    content['annotations'][0]['area'] = 64 * 64
    content['annotations'][1]['area'] = 65 * 65  # a pixel more on each side
    assert coco.areas_larger_than_images(content, CLASSES) == []
    content['annotations'][2]['area'] = 66 * 66
    check_all(content)
    assert coco.areas_larger_than_images(content, CLASSES) == content['annotations'][2:]
    for annotation in content['annotations']:
        annotation['area'] = 1e7
    with pytest.raises(
        CocoError, match='all 3 areas of kite, vase are larger .*id 1, is 10000000'
    ):
        coco.check_evaluation(content, CLASSES)
    coco.check_format(content)  # training may


USES = [
    (dict(), coco.TRAINED),
    (dict(iscrowd=1), coco.CROWDS),
    (dict(image_id=5), coco.ABSENT),
    (dict(category_id=9), 'of no class of the config'),
    (dict(ignore=1), 'marked ignore'),
    (dict(bbox=[70, 0, 4, 4]), coco.OUTSIDE),
    (dict(bbox=[0, -9, 4, 9]), coco.OUTSIDE),
    (dict(bbox=[9, 9, 0.9, 4]), coco.SMALL),
    (dict(area=0), coco.NO_AREA),
    (dict(image_id=1), 'in images that filter_cfg leaves out'),
]


@pytest.mark.parametrize(
    'change, use', USES, ids=['-'.join(change) + '-' + use.split()[0] for change, use in USES]
)
def test_boxes_are_sorted_as_mmdet_does(content, change, use, tmp_path):
    """A use of its own for each reason, and as many instances as mmdet makes."""
    content['annotations'][0].update(change)
    boxes = coco.sort_boxes(content, CLASSES, [0, 2])
    expected = {coco.TRAINED: 1, 'in images that filter_cfg leaves out': 1}
    expected[use] = expected.get(use, 0) + 1
    assert {name: len(found) for name, found in boxes.items()} == expected
    everywhere = coco.sort_boxes(content, CLASSES)
    assert len(labels_of_mmdet(content, CLASSES, tmp_path)) == sum(
        len(everywhere.get(name, [])) for name in (coco.TRAINED, coco.CROWDS)
    )


def test_the_same_content_is_no_difference(content):
    other = copy.deepcopy(content)
    other['annotations'].reverse()
    other['images'][0]['file_name'] = 'folder/0.png'
    other['info'] = 'another'
    assert coco.difference([content], other, [0, 1, 2]) is None
    assert coco.difference([content], content, [0, 1, 2]) is None


@pytest.mark.parametrize(
    'change, expected',
    [
        (lambda other: other['images'].pop(), '1 images of the data are not in it, and 0 of'),
        (
            lambda other: other['images'].append(dict(id=9, file_name='9.png')),
            '0 .* 1 of its images',
        ),
        (lambda other: other['images'][1].update(file_name='7.png'), 'id 1 is 1.png .* and 7.png'),
        (lambda other: other['annotations'][1].update(bbox=[0, 0, 8, 8]), 'id 2 is .*8, 8'),
        (lambda other: other['annotations'][1].update(category_id=7), 'annotation id 2'),
        (lambda other: other['annotations'][1].update(iscrowd=1), 'annotation id 2'),
        (lambda other: other['annotations'].pop(), 'annotation id 3 is .* and absent'),
        (
            lambda other: other['annotations'].append(dict(other['annotations'][0], id=8)),
            'annotation id 8 is absent',
        ),
    ],
)
def test_another_ground_truth_is_told(content, change, expected):
    other = copy.deepcopy(content)
    change(other)
    with pytest.raises(AssertionError, match=expected):
        assert coco.difference([content], other, [0, 1, 2]) is None, coco.difference(
            [content], other, [0, 1, 2]
        )


def test_images_without_annotations_have_theirs_in_the_evaluators_file(content):
    images = dict(content)
    del images['annotations']
    assert coco.difference([images], content, [0, 1, 2]) is None


def test_one_file_over_several_data_sets(content):
    parts = [
        dict(content, images=content['images'][:1]),
        dict(content, images=content['images'][1:]),
    ]
    assert coco.difference(parts, content, [0, 1, 2]) is None
    assert 'is in several' in coco.difference([content, content], content, [0, 1, 2, 0])
