"""What the classification configs need beyond mmpretrain (the extra `cls`).

Not imported by the package: a config names it in its custom_imports.
"""

from pathlib import Path

from ..environment import check_extra, check_mmdet, without_notes_on_optional_parts

check_mmdet()
check_extra('cls', 'mmpretrain')

from mmdet.models.backbones import MobileNetV2  # noqa: E402

with without_notes_on_optional_parts():
    from mmpretrain.datasets import CustomDataset
    from mmpretrain.registry import DATASETS, MODELS


@MODELS.register_module()
class StridedMobileNetV2(MobileNetV2):
    """mmdet's MobileNetV2 with a choice of where it halves the image.

    Strides have no weights: what is trained with others fits mmdet's MobileNetV2 of
    the same width, and so the detectors.

    Args:
        strides (tuple[int]): of the first convolution and of the seven groups of
            blocks; (2, 1, 2, 2, 2, 1, 2, 1) is the usual one, for 224 px.
        **kwargs: mmdet's own.

    Raises:
        ValueError: not eight strides of 1 or 2.
    """

    def __init__(self, strides, **kwargs):
        if len(strides) != 8 or not set(strides) <= {1, 2}:
            raise ValueError(f'strides: expected eight numbers, each 1 or 2, got {strides!r}')
        self.arch_settings = [
            [expand, channels, blocks, stride]
            for (expand, channels, blocks, _), stride in zip(
                MobileNetV2.arch_settings, strides[1:], strict=True
            )
        ]
        super().__init__(**kwargs)
        self.conv1.conv.stride = (strides[0], strides[0])


@DATASETS.register_module()
class ListedImageFolder(CustomDataset):
    """Images in one sub-folder per class; a list can choose some of the classes.

    Args:
        class_list (str | None): text file with the name of a sub-folder in each
            line; they become the labels 0, 1, ... By default all sub-folders are,
            sorted by name.
        **kwargs: mmpretrain's own; ``data_root`` and ``data_prefix`` say where the
            sub-folders are.

    Raises:
        ValueError: the list is missing, empty or names a sub-folder twice, or one
            that does not exist or holds no image.
    """

    def __init__(self, class_list=None, **kwargs):
        if class_list is not None:
            kwargs['metainfo'] = {**kwargs.get('metainfo', {}), 'classes': _read(class_list)}
        self.class_list = class_list
        super().__init__(**kwargs)

    def _find_samples(self):
        if self.class_list is None:
            return super()._find_samples()
        samples = []
        for label, name in enumerate(self.metainfo['classes']):
            folder = Path(self.img_prefix, name)
            found = sorted(path.name for path in folder.glob('*') if self.is_valid_file(path.name))
            if not found:
                raise ValueError(
                    f'{folder}: expected images of class {name}, which '
                    f'{self.class_list} names, found none'
                )
            samples += [(f'{name}/{image}', label) for image in found]
        return samples


def _read(path):
    if not Path(path).is_file():
        raise ValueError(f'{path}: no such class list (current folder: {Path.cwd()})')
    names = Path(path).read_text().split()
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f'{path}: expected different names of sub-folders, one in each line, '
            f'got {len(names)}, {len(set(names))} of them different'
        )
    return tuple(names)
