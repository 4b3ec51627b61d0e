"""Trains many small classifiers on one GPU, several at once: which norm is better, with seeds.

What is trained comes from a plan (see `gpu_plan`); this needs neither MMDetection nor
MMPretrain.
"""

import json
import math
import time
from pathlib import Path

import torch

from ..convert import dn_layers
from ..provenance import hardware
from ..tables import append_rows, check_columns, read_table
from .gpu_recipe import Classifier
from .gpu_training import Refused, Training, check_layers, load_images
from .recording import norm_counts

PLAN, ARCHIVE = 'plan.json', 'images.tar.xz'  # in the folder that is carried to the GPU
BACKENDS = ('auto', 'triton', 'torch')  # of DN layers, in the order in which to try them
ROUNDS = 16  # steps of each model between two looks at the clock
MEASURED = ('value', 'averaged', 'folded', 'folded_most', 'folded_recalibrated', 'train_loss')


class Grid:
    """Trains the runs of a plan, several at once, and writes a row for each that ended.

    Runs whose row is in the file already are left out. Runs start in the order of the plan;
    one that cannot end before the limit, by the pace so far, is not started, and a shorter
    one behind it may be.

    Args:
        plan (dict): of `gpu_plan`.
        images: of `load_images`.
        path: CSV file of the rows.
        parallel (int): trainings at once.
        seconds (float): limit, from now on.
        backends: see `BACKENDS`.
        log: called with a line of text about what goes on.
    """

    def __init__(
        self, plan, images, path, parallel=8, seconds=math.inf, backends=BACKENDS, log=print
    ):
        self.columns, self.runs = plan['columns'], plan['runs']
        self.images, self.path, self.parallel = images, Path(path), parallel
        self.log, self.backends = log, backends
        self.begin = time.perf_counter()
        self.seconds = seconds
        self.slots = []  # trainings with their graphs, at work or idle
        self.running = {}  # training: its run and when it began
        self.pace = None  # seconds for a step of the usual batch, other trainings beside it
        self.usual_batch = max((run['row']['batch'] for run in self.runs), default=1)
        self.refused, self.late, self.good_backend = {}, [], {}

    def elapsed(self):
        return time.perf_counter() - self.begin

    def train(self) -> bool:
        """Returns whether every run of the plan has a row now."""
        ended = []
        if self.path.exists():
            ended = [_key(row) for row in read_table(self.path, [self.columns], {}, empty='')]
        todo = [run for run in self.runs if _key(run['row']) not in ended]
        self.log(f'{len(self.runs)} runs, {len(self.runs) - len(todo)} of them ended before')
        while todo or self.running:
            while todo and len(self.running) < self.parallel:
                self._begin(todo.pop(0))
            self._advance()
            for training in list(self.running):
                if training.done >= training.steps or training.diverged():
                    self._end(training)
            if self.elapsed() >= self.seconds:
                break
        left = [_title(run) for run, _ in self.running.values()] + [
            _title(run) for run in self.late + todo
        ]
        if left:
            more = f' and {len(left) - 8} more' if len(left) > 8 else ''
            self.log(
                f'{self.elapsed():.0f} s: the time is over, left: {", ".join(left[:8])}{more}'
            )
        for name, why in self.refused.items():
            self.log(f'{name} was refused: {why}')
        return not left and not self.refused

    def _begin(self, run):
        if run['name'] in self.refused:
            return
        if self._too_late(run):
            self.late.append(run)
            return
        try:
            training = self._slot(run)
        except Refused as error:
            self.refused[run['name']] = str(error)
            self.log(f'{run["name"]} is not trained: {error}')
            return
        training.start(run['row']['seed'])
        self.running[training] = run, time.perf_counter()

    def _too_late(self, run):
        """Whether all that is at work and this run would not end before the limit."""
        if self.pace is None:
            return False
        row = run['row']
        steps = len(self.images['train'][0]) // row['batch'] * row['epochs']
        work = steps * self._share(row['batch']) + sum(
            (training.steps - training.done) * self._share(training.batch)
            for training in self.running
        )
        return self.elapsed() + work * self.pace > self.seconds

    def _share(self, batch):
        """What a step costs, of one of the usual batch: small ones leave the GPU half idle."""
        return max(batch / self.usual_batch, 0.25)

    def _slot(self, run):
        """An idle training of the same recipe, or a new one, with its graph."""
        row = run['row']
        same = (run['recipe'], row['batch'], row['epochs'])
        idle = [slot for slot in self.slots if slot not in self.running]
        for slot in idle:
            if (slot.recipe, slot.batch, slot.epochs) == same:
                return slot
        for slot in idle[: max(0, len(self.slots) - self.parallel + 1)]:
            self.slots.remove(slot)
        begin = time.perf_counter()
        slot = self._captured(run, *same)
        self.slots.append(slot)
        self.log(
            f'{self.elapsed():.0f} s: {_title(run)}: ready in '
            f'{time.perf_counter() - begin:.1f} s, backend {slot.backend}'
        )
        return slot

    def _captured(self, run, recipe, batch, epochs):
        """With the first backend that computes what the reference does and can be captured."""
        known = self.good_backend.get(run['name'])
        device, size = self.images['train'][0].device, self.images['train'][0].shape[-1]
        has_dn = bool(dn_layers(Classifier(recipe)))
        reasons = []
        for backend in [known] if known else self.backends if has_dn else ['-']:
            try:
                if not known and has_dn:
                    worst = check_layers(recipe, backend, device, size, min(batch, 128))
                    self.log(
                        f'{run["name"]}, backend {backend}: errors at most {worst:.2f} of '
                        f'what is allowed'
                    )
                training = Training(recipe, batch, epochs, self.images, backend)
                training.capture()
                if not known:
                    training.check_graph()
            except (Refused, ImportError, RuntimeError, ValueError) as error:
                reasons.append(f'{backend}: {error}')
                self.log(f'{run["name"]}, backend {backend}: {error}')
                continue
            self.good_backend[run['name']] = backend
            return training
        raise Refused('; '.join(reasons))

    def _advance(self):
        begin = time.perf_counter()
        for _ in range(ROUNDS // 4):
            for training in self.running:
                training.advance(4 * max(1, self.usual_batch // training.batch))
            if self.elapsed() >= self.seconds:
                return
        for training in self.running:
            training.synchronize()
        if all(training.batch == self.usual_batch for training in self.running):
            self.pace = (time.perf_counter() - begin) / ROUNDS / max(len(self.running), 1)

    def _end(self, training):
        run, begin = self.running.pop(training)
        seconds = round(time.perf_counter() - begin, 1)
        row = dict(
            run['row'],
            norm='+'.join(norm_counts(training.model)),
            params=sum(p.numel() for p in training.parameters),
            seconds=seconds,
            hardware=hardware(),
            backend=training.backend,
        )
        if training.diverged():
            row.update(status='diverged')
        else:
            row.update(training.results(), status='finished')
        append_rows(self.path, [row], self.columns)
        measured = ', '.join(f'{key} {row[key]:.4g}' for key in MEASURED if key in row)
        self.log(f'{self.elapsed():.0f} s: {_title(run)}: {row["status"]}: {measured}')


def _title(run):
    row = run['row']
    return (
        f'{run["name"]}:{row["seed"]} (lr {row["lr"]:g}, batch {row["batch"]}, '
        f'{row["epochs"]} epochs)'
    )


def _key(row):
    """What tells a run from the others, as it is read from a file."""
    return tuple(
        str(row[name]) for name in ('question', 'data', 'config', 'seed', 'epochs', 'lr', 'batch')
    )


def train(folder, path, seconds=math.inf, parallel=8, backends=BACKENDS, device=None) -> bool:
    """Trains what `gpu_plan.prepare` wrote into a folder; see `Grid`."""
    folder, begin = Path(folder), time.perf_counter()
    for name in (PLAN, ARCHIVE):
        if not (folder / name).is_file():
            raise ValueError(f'{folder / name}: no such file; make it with --prepare')
    plan = json.loads((folder / PLAN).read_text())
    check_columns(path, plan['columns'])
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    to_rgb = {run['recipe']['data_preprocessor']['to_rgb'] for run in plan['runs']}
    if len(to_rgb) != 1:
        raise ValueError(f'{folder / PLAN}: expected runs with the same to_rgb')
    images = load_images(folder / ARCHIVE, to_rgb.pop(), device)

    def log(text):
        print(text, flush=True)

    log(
        f'{hardware()}, torch {torch.__version__}; images decoded in '
        f'{time.perf_counter() - begin:.1f} s'
    )
    grid = Grid(
        plan, images, path, parallel, seconds - (time.perf_counter() - begin), backends, log
    )
    return grid.train()
