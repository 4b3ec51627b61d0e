"""Annotation files in COCO's format: what mmdet's CocoDataset and pycocotools make of them.

Neither checks what it reads. Some files end a training hours later, others train wrong
labels or give a wrong AP, and say nothing. Each rule here is a function that raises
`CocoError` with one sentence: which entry, what was expected, what to do.
"""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np

from ..messages import some

# What `sort_boxes` finds. The `MISTAKES` are left out of a training by nobody's choice.
TRAINED, CROWDS = 'trained', 'crowds (iscrowd=1)'
OUTSIDE, SMALL, NO_AREA = 'outside of their image', 'smaller than a pixel', 'of area 0'
ABSENT = 'of images that are not in the file'
MISTAKES = (OUTSIDE, SMALL, NO_AREA, ABSENT)
# What `check_masks` finds.
NO_PIXEL, SHORT_PARTS = (
    'no area, or lie outside of their image',
    'parts of fewer than three points, which are left out',
)
# What mmdet and pycocotools read from each entry.
KEYS = dict(
    images={'id', 'file_name', 'height', 'width'},
    categories={'id', 'name'},
    annotations={'id', 'image_id', 'category_id', 'bbox', 'area'},
)
LARGEST = 2**63  # pycocotools sorts ids as numpy integers
TOLERANCE = 1  # pixels by which a box may reach out of its image, as of rounding


class CocoError(ValueError):
    """An annotation file that would end a run or make its results wrong."""


def check_format(content, annotations=True) -> None:
    """What every use of a file needs.

    Args:
        content: as `json.load` gives it.
        annotations (bool): False where the file may come without any, as of test images.
    """
    check_entries(content, annotations)
    for part in KEYS:
        check_ids(part, content.get(part) or [])
    check_images(content['images'])
    boxes = _annotations(content)
    check_boxes(boxes)
    check_areas(boxes)
    check_crowds(boxes)
    check_ignored(boxes)
    check_references(content)
    check_units(content)


def check_entries(content, annotations=True) -> None:
    for part, keys in KEYS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if entries is None and part == 'annotations' and not annotations:
            continue
        if not isinstance(entries, list):
            raise CocoError(f'expected COCO annotations, with a list of {part}')
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict) or not keys <= entry.keys():
                raise CocoError(
                    f'expected COCO annotations, with {", ".join(sorted(keys))} in '
                    f'each of {part}; number {index} is {str(entry)[:200]}'
                )
    if not content['images']:
        raise CocoError('lists no images')


def check_ids(part, entries) -> None:
    """Whole numbers, or texts, and each once: what comes later would replace the earlier."""
    seen = {}
    for index, entry in enumerate(entries):
        number = entry['id']
        if not _is_id(number):
            raise CocoError(
                f'{part}: number {index} has the id {number!r}: expected a whole '
                f'number. Number the {part} from 1'
            )
        if number in seen:
            raise CocoError(
                f'{part}: numbers {seen[number]} and {index} both have the id '
                f'{number!r}, and one would replace the other. Give every entry '
                f'an id of its own'
            )
        seen[number] = index
    if len({isinstance(number, str) for number in seen}) > 1:
        raise CocoError(
            f'{part}: some ids are numbers and some are texts. Number the {part} from 1'
        )


def _is_id(number):
    if isinstance(number, str):
        return True
    return (
        isinstance(number, (int, float))
        and not isinstance(number, bool)
        and number % 1 == 0
        and abs(number) < LARGEST
    )


def check_images(images) -> None:
    for index, image in enumerate(images):
        name, height, width = image['file_name'], image['height'], image['width']
        if not isinstance(name, str) or not name:
            raise CocoError(
                f'images: {_entry(index, image)} has the file_name {name!r}: '
                f'expected the name of a file'
            )
        if not (_is_number(height) and _is_number(width) and height > 0 and width > 0):
            raise CocoError(
                f'images: {_entry(index, image)} has the height {height!r} and the '
                f'width {width!r}: expected those of {name} in pixels'
            )


def check_boxes(annotations) -> None:
    for index, annotation in enumerate(annotations):
        box = annotation['bbox']
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise CocoError(
                f'annotations: {_entry(index, annotation)} has the bbox {box!r}: '
                f'expected x, y, width and height in pixels. Write them, or remove '
                f'the annotation'
            )
        if box[2] < 0 or box[3] < 0:
            raise CocoError(
                f'annotations: {_entry(index, annotation)} has the bbox {box!r}: '
                f'expected a width and a height that are not negative. Write x, y '
                f'of the upper left corner, or remove the annotation'
            )


def check_areas(annotations) -> None:
    for index, annotation in enumerate(annotations):
        area = annotation['area']
        if not _is_number(area) or area < 0:
            raise CocoError(
                f'annotations: {_entry(index, annotation)} has the area {area!r}: '
                f'expected that of the object in pixels. Where it is unknown, write '
                f'width * height of its bbox'
            )


def check_crowds(annotations) -> None:
    for index, annotation in enumerate(annotations):
        crowd = annotation.get('iscrowd')
        if not (crowd is None or isinstance(crowd, (int, float)) and crowd in (0, 1)):
            raise CocoError(
                f'annotations: {_entry(index, annotation)} has iscrowd {crowd!r}: '
                f'expected 0, or 1 for a crowd'
            )


def check_ignored(annotations) -> None:
    """mmdet does not train on what is marked, and any text is a mark, also 'false'."""
    for index, annotation in enumerate(annotations):
        ignored = annotation.get('ignore')
        if not (ignored is None or isinstance(ignored, (int, float)) and ignored in (0, 1)):
            raise CocoError(
                f'annotations: {_entry(index, annotation)} has ignore {ignored!r}: '
                f'expected 0, or 1 for a box that is not trained on'
            )


def check_references(content) -> None:
    """Leaves out annotations of images that are not listed; an unlisted category is an error."""
    images = {image['id'] for image in content['images']}
    categories = {category['id'] for category in content['categories']}
    annotations = _annotations(content)
    found = False
    for index, annotation in enumerate(annotations):
        image, category = annotation['image_id'], annotation['category_id']
        if not (_is_id(image) and _is_id(category)):
            raise CocoError(
                f'annotations: {_entry(index, annotation)} has the image_id '
                f'{image!r} and the category_id {category!r}: expected the id of '
                f'one of images and of one of categories'
            )
        if image not in images:
            continue
        found = True
        if category not in categories:
            raise CocoError(
                f'annotations: {_entry(index, annotation)} has the category_id '
                f'{category!r}, which none of categories has ({some(categories)}): '
                f'its box would be left out without any message. Write the '
                f'right category_id, or add the category'
            )
    if annotations and not found:
        raise CocoError(
            f'annotations: none of {len(annotations)} has the image_id of one of '
            f'images; the first has {annotations[0]["image_id"]!r}, the images have '
            f'{some(map(repr, images))}. Write the ids of the images'
        )


def check_units(content) -> None:
    """Corners instead of width and height, and shares of the image instead of pixels."""
    _, boxes, sizes = _of_listed_images(content)
    if not len(boxes):
        return
    if (boxes <= 1).all():
        raise CocoError(
            f'annotations: all {len(boxes)} boxes lie within one pixel: expected x, '
            f'y, width and height in pixels, these look like shares of the image. '
            f'Multiply them by its width and height'
        )
    corner, far = boxes[:, :2], boxes[:, 2:]
    outside = (corner + far > sizes + TOLERANCE).any(1).sum()
    if outside > len(boxes) / 10 and ((corner <= far) & (far <= sizes + TOLERANCE)).all():
        raise CocoError(
            f'annotations: {outside} of {len(boxes)} boxes reach out of their image '
            f'as x, y, width, height, and all lie in it as x1, y1, x2, y2. Write '
            f'width and height in place of x2 and y2'
        )


def _annotations(content):
    """Those of a file; none where it comes without any."""
    return content.get('annotations') or []


def sizes_of(content):
    """Width and height of each image, by its id."""
    return {image['id']: (image['width'], image['height']) for image in content['images']}


def _of_listed_images(content):
    """Annotations whose images are listed, their boxes (x, y, w, h) and image sizes (w, h)."""
    sizes = sizes_of(content)
    annotations = [
        annotation for annotation in _annotations(content) if annotation['image_id'] in sizes
    ]
    return (
        annotations,
        _table((annotation['bbox'] for annotation in annotations), 4),
        _table((sizes[annotation['image_id']] for annotation in annotations), 2),
    )


def _table(rows, columns):
    """An array of boxes, several times faster than by `numpy.array` of lists."""
    return np.fromiter(itertools.chain.from_iterable(rows), float).reshape(-1, columns)


def check_labels(content, classes, expected='the classes', sort=False) -> None:
    """The classes of a config against the categories, in whose order labels are numbered.

    Args:
        classes (tuple): names.
        expected (str): the option that sets them.
        sort (bool): whether the reader sorts the categories by id.
    """
    categories = content['categories']
    if sort:
        categories = sorted(categories, key=lambda category: category['id'])
    names = [category['name'] for category in categories]
    absent = [name for name in classes if name not in names]
    if absent:
        raise CocoError(
            f'has {len(names)} classes ({some(names)}). Of the {len(classes)} that are '
            f'expected, {some(absent)} are missing. Set {expected} (also of the '
            f'other data sets) to the names in the file and num_classes of the '
            f'heads to their number'
        )
    for name in classes:
        if names.count(name) > 1:
            raise CocoError(
                f'categories: {_same_name(content, name)}; each would be a class of '
                f'its own, and all labels after it wrong. Keep one of them, and '
                f'write its id into the annotations of the others'
            )
    found = [name for name in names if name in classes]
    if found != list(classes):
        ours, theirs = next(
            pair for pair in zip(classes, found, strict=True) if pair[0] != pair[1]
        )
        raise CocoError(
            f'categories: the file has the order {some(found)}, but {expected} has the '
            f'order {some(classes)}. Labels follow the order of the file, so {theirs} would '
            f'be taken for {ours}. Put both into the same order'
        )


def _same_name(content, name):
    counts = Counter(annotation['category_id'] for annotation in _annotations(content))
    ids = [category['id'] for category in content['categories'] if category['name'] == name]
    listed = ', '.join(f'id {number!r} with {counts[number]} boxes' for number in ids)
    return f'{len(ids)} have the name {name!r} ({listed})'


def category_ids(content, classes) -> list:
    """The ids of the classes, by label, as `check_labels` has made sure."""
    return [category['id'] for category in content['categories'] if category['name'] in classes]


def sort_boxes(content, classes, image_ids=None) -> dict[str, list]:
    """What a training by mmdet makes of each box: {its use or the reason: annotations}.

    Those under `TRAINED` are trained on, those under `CROWDS` are regions to ignore, and
    the others are left out, and no message says so.

    Args:
        image_ids: of the images that are left after ``filter_cfg``; None for all.
    """
    sizes = sizes_of(content)
    left = sizes.keys() if image_ids is None else set(image_ids)
    ids = set(category_ids(content, classes))
    sorted_ = {}
    for annotation in _annotations(content):
        w, h = annotation['bbox'][2:]
        image = annotation['image_id']
        if image not in sizes:
            use = ABSENT
        elif image not in left:
            use = 'in images that filter_cfg leaves out'
        elif annotation['category_id'] not in ids:
            use = 'of no class of the config'
        elif annotation.get('ignore'):
            use = 'marked ignore'
        elif _is_outside(annotation['bbox'], sizes[image]):
            use = OUTSIDE
        elif w < 1 or h < 1:
            use = SMALL
        elif annotation['area'] <= 0:
            use = NO_AREA
        else:
            use = CROWDS if annotation.get('iscrowd') else TRAINED
        sorted_.setdefault(use, []).append(annotation)
    return sorted_


def check_masks(annotations, sizes=None) -> dict[str, list]:
    """Masks that mmdet and pycocotools would misread.

    Args:
        sizes (dict): width and height of each image, by its id; with None, masks are compared
            with no image.

    Returns:
        {what is lost: the annotations that lose it}, of masks that can be read.
    """
    lost = {NO_PIXEL: [], SHORT_PARTS: []}
    largest = -LARGEST
    for annotation in annotations:
        number, mask = annotation['id'], annotation.get('segmentation')
        size = sizes[annotation['image_id']] if sizes else None
        if not mask:
            raise CocoError(
                f'annotations: id {number!r} has no segmentation: expected '
                f'one in each, since masks are asked for. Add it, or remove the '
                f'annotation'
            )
        if isinstance(mask, dict) and {'counts', 'size'} <= mask.keys():
            largest = LARGEST
            has_pixels = _check_runs(number, mask, size)
        elif _are_polygons(mask):
            if largest <= 1:
                largest = max(largest, *(max(points) for points in mask if points))
            has_pixels = any(_has_extent(points, size) for points in mask if points)
            if any(len(points) < 6 for points in mask):
                lost[SHORT_PARTS].append(annotation)
        else:
            raise CocoError(
                f'annotations: id {number!r} has the segmentation '
                f'{str(mask)[:100]}: expected polygons, each a list x1, y1, x2, y2, '
                f'... of at least three points, or counts and size; with others the '
                f'evaluation fails. Write polygons'
            )
        if not has_pixels:
            lost[NO_PIXEL].append(annotation)
    if annotations and largest <= 1:
        raise CocoError(
            f'annotations: all {len(annotations)} segmentations lie within one pixel: expected '
            f'polygons in pixels, these look like shares of the image. Multiply them by its '
            f'width and height'
        )
    if sizes and annotations and len(lost[NO_PIXEL]) == len(annotations):
        raise CocoError(
            f'annotations: all {len(annotations)} segmentations have no area or lie outside of '
            f'their image (the first has the id {annotations[0]["id"]!r}): expected masks of '
            f'objects. Write polygons in pixels of these images'
        )
    return {what: found for what, found in lost.items() if found}


def _are_polygons(mask):
    """The first has three points; of others, mmdet leaves out those that have fewer."""
    return (
        isinstance(mask, list)
        and all(isinstance(points, list) and _are_coordinates(points) for points in mask)
        and len(mask[0]) >= 6  # pycocotools looks at this one
    )


def _are_coordinates(values):
    return len(values) % 2 == 0 and _are_numbers(values)


def _are_numbers(values):
    """As `_is_number` of each, several times faster."""
    return not values or (
        set(map(type, values)) <= {int, float}
        and -LARGEST < min(values)
        and max(values) < LARGEST
        and abs(sum(values)) < np.inf  # as with NaN it is not
    )


def _has_extent(points, size):
    """Whether a polygon has a width and a height, and does not lie outside of its image."""
    xs, ys = points[::2], points[1::2]
    x, y, w, h = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    return w > 0 and h > 0 and not (size and _is_outside((x, y, w, h), size))


def _check_runs(number, mask, size):
    """Checks a mask of run lengths; returns whether any pixel is of the object."""
    counts, (height, width) = mask['counts'], mask['size'] if _is_size(mask['size']) else (0, 0)
    expected = (size[1], size[0]) if size else (height, width)
    if (height, width) != expected or not height:
        has = f', and its image has the height {size[1]} and the width {size[0]}' if size else ''
        raise CocoError(
            f'annotations: id {number!r} has a mask of run lengths with the size '
            f'{mask["size"]!r}{has}: expected size=[height, width] of the image; with another '
            f'the mask is that of other pixels. Encode the masks at the size of these images'
        )
    runs = _runs(counts)
    if runs is None:
        raise CocoError(
            f'annotations: id {number!r} has a mask with the counts {str(counts)[:100]}: '
            f'expected a list of run lengths, or the text that pycocotools makes of them. '
            f'Encode the mask again, or write polygons'
        )
    if runs.sum() != height * width:
        raise CocoError(
            f'annotations: id {number!r} has a mask whose counts add up to {runs.sum():.0f} '
            f'pixels: expected height * width = {height * width}; the rest would be read '
            f'from uninitialised memory. Encode the mask again, or write polygons'
        )
    return runs[1::2].any()


def _is_size(size):
    return isinstance(size, list) and len(size) == 2 and _are_numbers(size) and min(size) > 0


def _runs(counts):
    """Lengths of runs, background and object in turn; None where ``counts`` gives none."""
    if isinstance(counts, list):
        runs = np.array(counts, float) if _are_numbers(counts) else None
    else:
        runs = _decompressed(counts) if isinstance(counts, str) else None
    right = runs is not None and len(runs) and runs.min() >= 0 and (runs % 1 == 0).all()
    return runs if right else None


def _decompressed(text):
    """What pycocotools reads from a text: 5 bits a letter, and differences to the last but one."""
    letters = np.frombuffer(text.encode(errors='replace'), np.uint8).astype(int) - 48
    if not len(letters) or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        return None
    ends = np.flatnonzero(letters & 32 == 0)
    starts = np.append(0, ends[:-1] + 1)
    places = np.arange(len(letters)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 6:  # more than the 32 bits of a count
        return None
    runs = np.add.reduceat((letters & 31) << 5 * places, starts)
    runs -= np.where(letters[ends] & 16, 1 << 5 * (places[ends] + 1), 0)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs


def check_evaluation(content, classes, masks=False) -> dict[str, list]:
    """What pycocotools needs of the ground truth.

    Args:
        classes (tuple): names; the others are not evaluated.
        masks (bool): whether masks are evaluated.

    Returns:
        What `check_masks` returns; of boxes alone nothing.
    """
    evaluated = _evaluated(content, classes)
    for annotation in evaluated:
        number = annotation['id']
        if isinstance(number, str) or number == 0:
            raise CocoError(
                f'annotations: one has the id {number!r}: expected a number other '
                f'than 0, which stands for "no match" in pycocotools, so that its '
                f'box would never count as found. Number the annotations from 1'
            )
        if annotation.get('iscrowd') is None:
            raise CocoError(
                f'annotations: id {number!r} has no iscrowd, without which the '
                f'evaluation fails: write "iscrowd": 0, or 1 for a crowd'
            )
    if not any(annotation['iscrowd'] == 0 for annotation in evaluated):
        raise CocoError(
            f'has no box of {some(classes)} to compare with: of '
            f'{len(_annotations(content))} annotations {len(evaluated)} '
            f'are of these classes, all of them crowds (iscrowd=1), and AP would '
            f'be -1. Use a file with boxes'
        )
    lost = never_found(content, classes)
    if len(lost) == sum(annotation['iscrowd'] == 0 for annotation in evaluated):
        raise CocoError(
            f'annotations: all {len(lost)} boxes of {some(classes)} have no size or '
            f'lie outside of their image (the first, id {lost[0]["id"]!r}, is '
            f'{lost[0]["bbox"]}), and AP would be 0. Write x, y, width and height in '
            f'pixels of these images'
        )
    large = areas_larger_than_images(content, classes)
    if len(large) == len(evaluated):
        raise CocoError(
            f'annotations: all {len(large)} areas of {some(classes)} are larger than their image '
            f'(the first, id {large[0]["id"]!r}, is {large[0]["area"]}): expected those of the '
            f'objects in pixels, since AP of small, medium and large objects goes by them. Where '
            f'they are unknown, write width * height of the bbox'
        )
    return check_masks(evaluated, sizes_of(content)) if masks else {}


def _evaluated(content, classes):
    """The annotations of some classes in images that are listed."""
    images = {image['id'] for image in content['images']}
    ids = set(category_ids(content, classes))
    return [
        annotation
        for annotation in _annotations(content)
        if annotation['category_id'] in ids and annotation['image_id'] in images
    ]


def never_found(content, classes) -> list:
    """The annotations, no crowds, whose boxes have no size or lie outside of their image."""
    sizes = sizes_of(content)
    return [
        annotation
        for annotation in _evaluated(content, classes)
        if not annotation.get('iscrowd')
        and (
            min(annotation['bbox'][2:]) <= 0
            or _is_outside(annotation['bbox'], sizes[annotation['image_id']])
        )
    ]


def marked_ignore(content, classes) -> list:
    """The annotations that mmdet does not train on, and pycocotools takes for objects to find."""
    return [
        annotation
        for annotation in _evaluated(content, classes)
        if annotation.get('ignore') and not annotation.get('iscrowd')
    ]


def areas_larger_than_images(content, classes) -> list:
    """The annotations of these classes with such areas, by more than rounding."""
    largest = {
        number: (width + TOLERANCE) * (height + TOLERANCE)
        for number, (width, height) in sizes_of(content).items()
    }
    return [
        annotation
        for annotation in _evaluated(content, classes)
        if annotation['area'] > largest[annotation['image_id']]
    ]


def _is_outside(box, size):
    x, y, w, h = box
    return x + w <= 0 or y + h <= 0 or x >= size[0] or y >= size[1]


def boxes_reaching_out(content) -> list:
    """The annotations whose boxes reach out of their image by more than rounding."""
    annotations, boxes, sizes = _of_listed_images(content)
    out = (boxes[:, :2] < -TOLERANCE) | (boxes[:, :2] + boxes[:, 2:] > sizes + TOLERANCE)
    return [annotations[index] for index in np.flatnonzero(out.any(1))]


def difference(data, truth, image_ids) -> str | None:
    """The first thing in which an evaluator's file differs from that of the data, or None.

    Args:
        data (list): contents of the files of the data sets.
        truth: content of the evaluator's.
        image_ids (list): of all images that are evaluated.
    """
    found, expected = set(image_ids), {image['id'] for image in truth['images']}
    if len(image_ids) != len(found):
        number = Counter(image_ids).most_common(1)[0][0]
        return f'the image id {number!r} is in several data sets'
    if found != expected:
        return (
            f'{len(found - expected)} images of the data are not in it, and '
            f'{len(expected - found)} of its images are not in the data'
        )
    if all(content is truth for content in data):
        return None
    names = {image['id']: _name(image) for image in truth['images']}
    for content in data:
        for image in content['images']:
            if image['id'] in found and _name(image) != names[image['id']]:
                return (
                    f'image id {image["id"]!r} is {_name(image)} in the data and '
                    f'{names[image["id"]]} in it'
                )
    if not all('annotations' in content for content in data):
        return None
    ours = {
        a['id']: _what(a)
        for content in data
        for a in content['annotations']
        if a['image_id'] in found
    }
    theirs = {a['id']: _what(a) for a in _annotations(truth) if a['image_id'] in found}
    for number in sorted(ours.keys() | theirs.keys(), key=str):
        if ours.get(number) != theirs.get(number):
            return (
                f'annotation id {number!r} is {ours.get(number, "absent")} in the data and '
                f'{theirs.get(number, "absent")} in it'
            )
    return None


def _name(image):
    return Path(image['file_name']).name


def _what(annotation):
    return {
        key: annotation.get(key) for key in ('image_id', 'category_id', 'bbox', 'area', 'iscrowd')
    }


def _is_number(value):
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -LARGEST < value < LARGEST
    )  # which NaN is not


def _entry(index, entry):
    return f'number {index} (id {entry["id"]!r})'
