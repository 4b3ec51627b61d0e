"""Evaluates a finished run of tools/compare.py with its DN layers folded, in a process of its own.

    python -m dn_mmdet.deploy.fold_run FOLDER

Writes ``folded.json`` into the folder of the run: for each column of `FOLDED` all metrics of the
config's evaluator, or in one sentence why the model cannot be folded.
"""

import argparse
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from torch import nn

from ..checkpoint import check_fits, open_checkpoint
from ..checks import preflight
from ..checks.preflight import reserved
from ..cli import command_line
from ..experiments.compare import last_checkpoint, read_result
from ..experiments.recording import check_parent, plain
from ..files import write_json
from ..fold import dynamic_of_most
from ..messages import ConfigError
from . import folding
from .folded_config import built

IMAGES = 512  # training images for the mean of g and h, as in tools/fold.py


def folded_metrics(cfg: Config, model: nn.Module) -> dict[str, dict | None]:
    """The metrics of a trained model with all and with most of its DN layers folded.

    Args:
        model: with its weights, as `built` makes it.

    Returns:
        by column of `results.FOLDED`; that of new running statistics is None where the
        config's training batches are too small for them. DN-C and other constant layers
        fold exactly, so that all are the same.

    Raises:
        ConfigError, ValueError: see `folding.Calibration` and `fold_norm`.
    """
    model = model.to(get_device())
    model.register_forward_pre_hook(check_parent)
    with folding.quiet():
        evaluation = folding.Evaluation(cfg)
        calibration = folding.Calibration(cfg, IMAGES, evaluation.loader.collate_fn)
    models = folding.Folding(model, calibration, evaluation)
    unreached = models.unreached()
    model = models.folded(unreached)
    found = dict(folded=_metrics(evaluation, model))
    if models.halves is None:
        return dict(found, folded_most=found['folded'], folded_recalibrated=found['folded'])
    enough = models.recalibrate(model, calibration.chosen)
    found['folded_recalibrated'] = _metrics(evaluation, model) if enough else None
    kept = [*unreached, *dynamic_of_most(models.report)]
    return dict(found, folded_most=_metrics(evaluation, models.folded(kept)))


def _metrics(evaluation, model):
    return {name: plain(value) for name, value in evaluation.metrics(model).items()}


def fold_run(folder: Path) -> None:
    """See the head of this file.

    Raises:
        ConfigError: the folder holds no finished run, or no checkpoint of it.
    """
    result, path = read_result(folder), last_checkpoint(folder)
    if result is None or result['status'] != 'finished':
        raise ConfigError(f'{folder}: expected a run that has finished: train it first')
    if path is None:
        raise ConfigError(f'{folder}: its checkpoint is gone: train it again, or leave it out')
    cfg = command_line.load_config(folder / 'config.py')
    checkpoint = open_checkpoint(path)
    model = built(cfg)
    check_fits(model, checkpoint, path)
    found: dict[str, dict | str | None]
    try:
        preflight.check_parts(cfg, 'val_dataloader', 'val_evaluator')
        found = {**folded_metrics(cfg, model)}
    except ValueError as error:
        check_parent()
        found = dict(not_folded=str(error))
    write_json(folder / 'folded.json', found)


def main(argv=None):
    parser = argparse.ArgumentParser(prog='fold_run', description=__doc__.split('\n')[0])
    parser.add_argument('folder', type=Path, help='folder of the run')
    folder = parser.parse_args(argv).folder
    with command_line.one_message(parser), reserved(folder, overwrite=True):
        fold_run(folder)


if __name__ == '__main__':
    sys.exit(main())
