"""Trains SSDLite on handwritten digits twice, with BN and with DN-B, and compares them.

Both trainings run at once, one thread each. Afterwards the folder holds
results.json, learning_curves.png, detections.png and, under bn/ and dnb/, logs,
checkpoints and single pictures.
"""
import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'
METRICS = {'AP': 'coco/bbox_mAP', 'AP50': 'coco/bbox_mAP_50', 'AP75': 'coco/bbox_mAP_75'}
PICTURES = 8
SCORE_THR = 0.3
# One core for each of the two. glibc returns large blocks to the system at every
# free and asks for them again at the next step; here that is a fifth of the time.
ENVIRONMENT = dict(OMP_NUM_THREADS='1', MALLOC_TRIM_THRESHOLD_='4294967296',
                   MALLOC_MMAP_MAX_='0')


class ChildFailed(Exception):
    """A tool that the demo started ended with an error; holds the end of its log."""


@dataclass
class Twin:
    name: str  # as in the table
    config: Path
    folder: Path

    @property
    def log(self):
        return self.folder / 'output.log'

    def checkpoint(self):
        return Path((self.folder / 'last_checkpoint').read_text().strip())

    def scalars(self, since=0):
        """What mmengine logged: one dict per line, of the run started after ``since``."""
        files = [file for file in self.folder.glob('*/vis_data/scalars.json')
                 if file.stat().st_mtime >= since]
        if not files:
            return []
        lines = max(files, key=lambda file: file.stat().st_mtime).read_text().splitlines(True)
        return [json.loads(line) for line in lines if line.endswith('\n')]


@contextlib.contextmanager
def running(commands):
    """Processes of {Twin: command}, each with its output in the twin's log.

    However the block is left, none of them is left behind.
    """
    processes = {}
    try:
        for twin, command in commands:
            twin.folder.mkdir(parents=True, exist_ok=True)
            with open(twin.log, 'w') as log:
                processes[twin.name] = subprocess.Popen(
                    [sys.executable, *map(str, command)], stdout=log, stderr=subprocess.STDOUT,
                    env={**os.environ, **ENVIRONMENT})
        yield processes
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def wait(twins, processes, meanwhile=lambda: None):
    """Until all have ended well.

    Raises:
        ChildFailed: one has not.
    """
    busy = True
    while busy:
        time.sleep(0.5)
        busy = any(process.poll() is None for process in processes.values())
        for twin in twins:
            if processes[twin.name].poll():
                tail = '\n'.join(twin.log.read_text(errors='replace').splitlines()[-15:])
                raise ChildFailed(f'{twin.name}: a child process ended with exit code '
                                  f'{processes[twin.name].poll()}. The end of its output '
                                  f'({twin.log}):\n{tail}')
        meanwhile()


def train(twins, seed, steps, console):
    """Trains all twins at once; returns the seconds that it took."""
    start = time.time()
    commands = [(twin, [TOOLS / 'train.py', twin.config, '--work-dir', twin.folder,
                        '--overwrite', '--seed', seed]) for twin in twins]
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TextColumn('left:'),
               TimeRemainingColumn(), TextColumn('{task.fields[loss]}'))
    with Progress(*columns, console=console) as progress, running(commands) as processes:
        bars = {twin.name: progress.add_task(f'training {twin.name}', total=steps, loss='')
                for twin in twins}

        def show():
            for twin in twins:
                rows = [row for row in twin.scalars(start) if 'loss' in row]
                if rows:
                    progress.update(bars[twin.name], completed=rows[-1]['step'],
                                    loss=f'loss {rows[-1]["loss"]:.2f}')

        wait(twins, processes, show)
        show()
    return time.time() - start


def detect(twins, images):
    """Runs tools/predict.py over a folder of images with every twin's last checkpoint."""
    commands = [(twin, [TOOLS / 'predict.py', twin.config, twin.checkpoint(), images,
                        '--out-dir', twin.folder / 'predictions', '--score-thr', SCORE_THR])
                for twin in twins]
    with running(commands) as processes:
        wait(twins, processes)


def results(twins):
    """{name: parameters, AP, AP50, AP75 and the loss of the last steps}."""
    from mmdet.registry import MODELS
    found = {}
    for twin in twins:
        rows = twin.scalars()
        model = MODELS.build(Config.fromfile(twin.config).model)
        found[twin.name] = dict(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            loss=[row['loss'] for row in rows if 'loss' in row][-1],
            **{short: [row[key] for row in rows if key in row][-1]
               for short, key in METRICS.items()})
    return found


def table_of(found, title):
    table = Table('norm', 'parameters', *METRICS, 'training loss', title=title)
    for name, row in found.items():
        table.add_row(name, f'{row["parameters"] / 1e6:.2f} M',
                      *(f'{row[metric]:.3f}' for metric in METRICS), f'{row["loss"]:.2f}')
    return table


def draw_curves(twins, path):
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    for twin in twins:
        rows = [row for row in twin.scalars() if 'loss' in row]
        axes.plot([row['step'] for row in rows], [row['loss'] for row in rows], label=twin.name)
    axes.set(xlabel='training step', ylabel='loss', yscale='log')
    axes.grid(alpha=0.3, which='both')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('{x:g}')
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_detections(twins, images, path):
    """One row per twin: its boxes with class and score, over the annotated ones, dashed."""
    plt = _pyplot()
    from matplotlib.patches import Rectangle
    annotated = _boxes_by_file(json.loads((images / 'annotations.json').read_text()))
    names = sorted(annotated)
    figure, axes = plt.subplots(len(twins), len(names), squeeze=False, layout='constrained',
                                figsize=(2.4 * len(names), 2.6 * len(twins)))
    for row, twin in zip(axes, twins, strict=True):
        predictions = twin.folder / 'predictions' / 'predictions.json'
        detected = _boxes_by_file(json.loads(predictions.read_text()))
        row[0].set_ylabel(twin.name)
        for cell, name in zip(row, names, strict=True):
            cell.imshow(plt.imread(images / name))
            cell.set(xticks=[], yticks=[])
            for x, y, w, h, _ in annotated[name]:
                cell.add_patch(Rectangle((x, y), w, h, fill=False, color='white', ls=':'))
            for x, y, w, h, text in detected[name]:
                cell.add_patch(Rectangle((x, y), w, h, fill=False, color='red', lw=1.5))
                cell.text(x, y, text, fontsize=8, color='white', va='bottom',
                          bbox=dict(facecolor='red', pad=1, lw=0))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pyplot():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


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
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    coco['images'] = coco['images'][:PICTURES]
    ids = {image['id'] for image in coco['images']}
    coco['annotations'] = [a for a in coco['annotations'] if a['image_id'] in ids]
    for image in coco['images']:
        shutil.copy(Path(dataset.data_prefix['img'], image['file_name']), folder)
    (folder / 'annotations.json').write_text(json.dumps(coco))


def run(twins, out, seed, console):
    """The whole demo into a folder; see the head of this file."""
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope
    init_default_scope('mmdet')
    cfg = Config.fromfile(twins[0].config)
    console.print(f'Making the data set {cfg.train_dataloader.dataset.data_root} where it is '
                  f'missing.')
    with contextlib.redirect_stdout(None):  # pycocotools tells how it reads a json
        train_set = DATASETS.build(cfg.train_dataloader.dataset)
        val_set = DATASETS.build(cfg.val_dataloader.dataset)
    steps = cfg.train_cfg.max_epochs * -(-len(train_set) // cfg.train_dataloader.batch_size)
    seconds = train(twins, seed, steps, console)
    found = results(twins)
    (out / 'results.json').write_text(json.dumps(found, indent=2))
    draw_curves(twins, out / 'learning_curves.png')
    pick_images(val_set, out / 'images')
    detect(twins, out / 'images')
    draw_detections(twins, out / 'images', out / 'detections.png')
    console.print(table_of(found, f'COCO box AP on unseen digits, {steps} steps of training in '
                                  f'{seconds / 60:.1f} minutes'))
    console.print(f'Learning curves: {out}/learning_curves.png\n'
                  f'Detections:      {out}/detections.png\n'
                  f'Seed {seed}; another seed moves each AP by some hundredths.', soft_wrap=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/demo'),
                        help='folder for the results (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='of both trainings')
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the children as Ctrl-C does
    twins = [Twin(name, ROOT / 'configs' / f'ssdlite_mbv2_{norm}_digits.py', args.out / norm)
             for name, norm in (('BN', 'bn'), ('DN-B', 'dnb'))]
    try:
        run(twins, args.out, args.seed, Console())
    except ChildFailed as error:
        parser.exit(1, f'{parser.prog}: error: {error}\n')
    except KeyboardInterrupt:
        parser.exit(130, f'\n{parser.prog}: interrupted; both trainings were ended\n')


if __name__ == '__main__':
    sys.exit(main())
