"""Trains SSDLite on handwritten digits with BN and with DN-B, folds DN-B, and compares all three.

It runs tools/compare.py with two runs, each on one thread. Afterwards the folder holds
report/ (tables, learning curves, an interactive page), detections.png, folded.pth (DN-B
folded into BatchNorms) and, under runs/, logs, checkpoints and single pictures.
"""

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from rich.console import Console

from dn_mmdet.checkpoint import check_fits, open_checkpoint
from dn_mmdet.checks.preflight import make_folder
from dn_mmdet.cli import command_line
from dn_mmdet.deploy import folded_files, folding
from dn_mmdet.deploy.folded_config import built
from dn_mmdet.experiments import compare, report
from dn_mmdet.messages import ConfigError
from dn_mmdet.provenance import commit_of
from dn_mmdet.tables import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PREDICT = ROOT / 'tools' / 'predict.py'
NAMES = ('ssdlite_mbv2_bn_digits', 'ssdlite_mbv2_dnb_digits')
MARK = '.demo'  # a file in each folder that a demo has written
PICTURES = 8
SCORE_THR = 0.3
NEXT = """\
  compare over three seeds:       .venv/bin/python tools/compare.py \\
                                      configs/ssdlite_mbv2_{bn,dnb}_digits.py --seeds 0 1 2
  DN-B in another detector:       .venv/bin/python tools/train.py \\
                                      mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --norm DNB
"""


class ChildFailed(Exception):
    """A tool that the demo started ended with an error; holds the end of its output."""


def clear(out):
    """Removes runs and images of an earlier demo, and marks the folder as one of the demo.

    Raises:
        ConfigError: there are files in the folder, and no demo has marked it.
    """
    if not (out / MARK).is_file() and out.is_dir() and any(out.iterdir()):
        raise ConfigError(
            f'{out}: expected a new folder, an empty one or one of an earlier demo; '
            f'choose another --out, or remove it'
        )
    make_folder(out, '--out')
    (out / MARK).touch()
    for name in ('runs', 'images'):
        shutil.rmtree(out / name, ignore_errors=True)


def train(configs, out, seed, console):
    """Runs both trainings at once, from the start; returns their runs."""
    variants = [
        compare.NamedConfig(path.stem, str(path), command_line.load_config(path))
        for path in configs
    ]
    points = compare.check(compare.product(variants, [seed]))
    runs = compare.plan(points, out / 'runs', 'demo', commit_of())
    failures = compare.run_grid(runs, len(runs), console)
    if failures:
        raise ChildFailed('\n'.join(f'{name}: {text}' for name, text in failures.items()))
    return runs


def detect(runs, images):
    """Runs tools/predict.py over a folder of images with every run's last checkpoint."""
    for run in runs:
        (checkpoint,) = compare.epoch_checkpoints(run.folder)
        command = [
            sys.executable,
            PREDICT,
            run.folder / 'config.py',
            checkpoint,
            images,
            '--out-dir',
            run.folder / 'predictions',
            '--score-thr',
            str(SCORE_THR),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            tail = '\n'.join(done.stdout.splitlines()[-compare.TAIL :])
            raise ChildFailed(
                f'{run.name}: tools/predict.py ended with exit code '
                f'{done.returncode}. The end of its output:\n{tail}'
            )


def draw_detections(runs, images, path):
    """One row per run: its boxes with class and score, over the annotated ones, dashed."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    annotated = _boxes_by_file(json.loads((images / 'annotations.json').read_text()))
    names = sorted(annotated)
    figure, axes = plt.subplots(
        len(runs),
        len(names),
        squeeze=False,
        layout='constrained',
        figsize=(2.4 * len(names), 2.6 * len(runs)),
    )
    for row, run in zip(axes, runs, strict=True):
        predictions = run.folder / 'predictions' / 'predictions.json'
        detected = _boxes_by_file(json.loads(predictions.read_text()))
        row[0].set_ylabel(run.spec['config'])
        for cell, name in zip(row, names, strict=True):
            cell.imshow(plt.imread(images / name))
            cell.set(xticks=[], yticks=[])
            for x, y, w, h, _ in annotated[name]:
                cell.add_patch(Rectangle((x, y), w, h, fill=False, color='white', ls=':'))
            for x, y, w, h, text in detected[name]:
                cell.add_patch(Rectangle((x, y), w, h, fill=False, color='red', lw=1.5))
                cell.text(
                    x,
                    y,
                    text,
                    fontsize=8,
                    color='white',
                    va='bottom',
                    bbox=dict(facecolor='red', pad=1, lw=0),
                )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _boxes_by_file(coco):
    """{file name: [(x, y, w, h, 'class score'), ...]}"""
    files = {image['id']: image['file_name'] for image in coco['images']}
    classes = {category['id']: category['name'] for category in coco['categories']}
    boxes = {name: [] for name in files.values()}
    for annotation in coco['annotations']:
        text = classes[annotation['category_id']]
        if 'score' in annotation:
            text += f' {annotation["score"]:.2f}'
        boxes[files[annotation['image_id']]].append((*annotation['bbox'], text))
    return boxes


def pick_images(dataset, folder):
    """Copies the first images of a COCO data set, and their annotations, into a folder."""
    coco = json.loads(Path(dataset.ann_file).read_text())
    folder.mkdir(parents=True)
    coco['images'] = coco['images'][:PICTURES]
    ids = {image['id'] for image in coco['images']}
    coco['annotations'] = [a for a in coco['annotations'] if a['image_id'] in ids]
    for image in coco['images']:
        shutil.copy(Path(dataset.data_prefix['img'], image['file_name']), folder)
    (folder / 'annotations.json').write_text(json.dumps(coco))


def fold(runs, out):
    """Folds the last run into BatchNorms, as tools/fold.py does; a table of all three models."""
    configs = [command_line.load_config(run.folder / 'config.py') for run in runs]
    models, checkpoints = [], []
    for run, cfg in zip(runs, configs, strict=True):
        (path,) = compare.epoch_checkpoints(run.folder)
        models.append(built(cfg).eval())
        checkpoints.append(open_checkpoint(path))
        check_fits(models[-1], checkpoints[-1], path)
    result = folding.fold(configs[-1], models[-1], curve=False, log=lambda text: None)
    folded_files.write(result, configs[-1], checkpoints[-1], out / 'folded.pth')
    with folding.quiet():
        evaluation = folding.Evaluation(configs[0], result.metric)
    bn, dnb, folded = (model.to(get_device()) for model in (*models, result.model))
    values = [evaluation(bn), result.rows[0].value, result.chosen.value]
    deployed = [folding.fused(model) for model in (bn, dnb, folded)]
    times = folding.milliseconds(deployed, evaluation.one_image(bn))
    rows = [
        [name, f'{value:.3f}', f'{took:.2f}']
        for name, value, took in zip(
            ('BN', 'DN-B', f'DN-B, {folded_files.row_name(result.chosen, result)}'),
            values,
            times,
            strict=True,
        )
    ]
    return markdown_table(['model', result.metric, 'ms per image'], rows)


def run(configs, out, seed, console):
    """The whole demo into a folder; see the head of this file."""
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    clear(out)
    init_default_scope('mmdet')
    cfg = Config.fromfile(configs[0])
    console.print(f'Preparing the data set in {cfg.train_dataloader.dataset.data_root}')
    with contextlib.redirect_stdout(None):  # pycocotools tells how it reads a json
        DATASETS.build(cfg.train_dataloader.dataset)
        val_set = DATASETS.build(cfg.val_dataloader.dataset)
    runs = train(configs, out, seed, console)
    written = report.write([run.folder for run in runs], out / 'report')
    pick_images(val_set, out / 'images')
    detect(runs, out / 'images')
    draw_detections(runs, out / 'images', out / 'detections.png')
    console.print(written.text, markup=False, soft_wrap=True)
    console.print(fold(runs, out), markup=False, soft_wrap=True)
    console.print(
        f'Learning curves: {out}/report/learning_curves.png\n'
        f'Detections:      {out}/detections.png\n'
        f'DN-B folded:     {out}/folded.pth, a BatchNorm checkpoint. Times are those of the '
        f'network alone, with BatchNorms folded into convolutions, {folded_files.timed_on()}\n'
        f'\nThis is one run of each norm (seed {seed}), so it says little: the AP of one seed '
        f'differs by up to 0.1 between two machines.\n\n'
        f'What to try next:\n{NEXT}',
        markup=False,
        soft_wrap=True,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/demo'),
        help='folder for the results. The results of an earlier demo in it are replaced, and a '
        'folder with other files is refused (default: %(default)s)',
    )
    parser.add_argument(
        '--seed', type=int, default=0, help='random seed of both trainings (default: %(default)s)'
    )
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the children as Ctrl-C does
    try:
        with command_line.one_message(parser):
            run(
                [ROOT / 'configs' / f'{name}.py' for name in NAMES],
                args.out,
                args.seed,
                Console(highlight=False),
            )
    except ChildFailed as error:
        parser.exit(1, f'{parser.prog}: error: {error}\n')


if __name__ == '__main__':
    sys.exit(main())
