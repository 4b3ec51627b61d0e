"""What tools/fold.py writes: a checkpoint, its config, tables and a figure."""

import io
import math
from pathlib import Path

import torch
from mmengine.config import Config

from ..checkpoint import meta_of
from ..checks import preflight
from ..files import replacing, write_text
from ..messages import ConfigError
from ..tables import markdown_table
from .folded_config import built, folded_config, from_text
from .folding import Result, Row

SUFFIXES = ('.pth', '.py', '.md', '.png')  # of what `write` writes


def check_out(out: Path) -> None:
    """Raises ConfigError where a result would replace a file or cannot be written."""
    if out.suffix != '.pth':
        raise ConfigError(f'--out: expected a file name in .pth, got {out}')
    preflight.check_new(map(out.with_suffix, SUFFIXES), '--out')
    preflight.make_folder(out.parent, '--out')


def write(result: Result, cfg: Config, checkpoint: dict, out: Path) -> str:
    """The checkpoint, its config, the tables and the figure; returns what the tables say.

    Raises:
        ConfigError: the checkpoint would not load into the config. Nothing was written then.
    """
    dynamic = result.chosen.kept
    cfg = folded_config(cfg, [row.name for row in result.report], dynamic)
    state = result.model.state_dict()
    try:
        built(from_text(cfg)).load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f'{out}: not written, the folded weights do not fit the config that '
            f'belongs to them: {error}'
        ) from error
    meta = dict(
        meta_of(checkpoint),
        cfg=cfg.pretty_text,
        folded=dict(
            layers=[row.name for row in result.report if row.folded], dynamic=list(dynamic)
        ),
    )
    text = in_words(result)
    figure = io.BytesIO()  # drawn before anything is written
    draw(result, figure)
    check_out(out)  # again: the evaluations took a while
    with replacing(out) as part:
        torch.save(dict(meta=meta, state_dict=state), part)
    write_text(out.with_suffix('.py'), cfg.pretty_text)
    write_text(out.with_suffix('.md'), text)
    with replacing(out.with_suffix('.png')) as part:
        part.write_bytes(figure.getvalue())
    return text


def in_words(result: Result) -> str:
    """The table of the models, a sentence about the images, and the table of the layers."""
    return (
        f'{_models_table(result)}\n'
        f'Chosen: {row_name(result.chosen, result)}. Times are of the network alone, one '
        f'image, BatchNorms folded into convolutions, {timed_on()}.\n'
        f'{_about_images(result)}\n{_layers_table(result)}'
    )


def _models_table(result):
    first = result.rows[0]
    header = [
        'layers',
        result.metric,
        'to dynamic',
        'new statistics',
        'parameters',
        'Mult-Adds',
        'ms per image',
    ]
    lines = [
        [
            row_name(row, result),
            f'{row.value:.4g}',
            f'{row.value - first.value:+.4g}',
            'yes' if row.recalibrated else 'no',
            f'{row.parameters / 1e6:.3f} M',
            f'{row.mult_adds / 1e6:.2f} M',
            f'{row.milliseconds:.2f}',
        ]
        for row in result.rows
    ]
    if first.changed is not None:
        header.append('on changed images')
        for row, line in zip(result.rows, lines, strict=True):
            line.append(f'{row.changed:.4g}')
    return markdown_table(header, lines)


def _about_images(result):
    if not result.halves:
        return 'All layers have constant scale and shift: folding is exact.\n'
    first, second = result.halves
    return (
        f'Calibrated with {result.images} training images; with the first and the second '
        f'half of them alone {result.metric} is {first:.4g} and {second:.4g}, '
        f'{abs(first - second):.4g} apart. They have to be like the images that the model '
        f'will see: for others, fold again.\n'
    )


def _layers_table(result):
    header = ['layer', 'was', 'std of g', 'std of h', 'share of variance', 'now']
    lines = [
        [
            row.name,
            row.kind,
            f'{row.g_std:.4f}',
            f'{row.h_std:.4f}',
            f'{row.share:.2e}',
            _became(row),
        ]
        for row in result.report
    ]
    return markdown_table(header, lines)


def _became(row):
    if row.folded:
        return 'BatchNorm'
    return 'dynamic, reached by no image' if math.isnan(row.share) else 'dynamic'


def row_name(row: Row, result: Result) -> str:
    """'12 of 66 dynamic'"""
    count, all_layers = len(row.kept), len(result.report)
    if count == all_layers:
        return 'all dynamic'
    return f'{count} of {all_layers} dynamic' if count else f'all {all_layers} folded'


def timed_on() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f'CPU, {threads} thread{"s" if threads > 1 else ""}'


def draw(result: Result, out) -> None:
    """The metric over the time for an image, as PNG."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
    rows = result.rows
    axes.plot([row.milliseconds for row in rows], [row.value for row in rows], 'o-')
    for row in rows:
        axes.annotate(
            row_name(row, result),
            (row.milliseconds, row.value),
            fontsize=8,
            textcoords='offset points',
            xytext=(4, 6),
        )
    axes.plot(result.chosen.milliseconds, result.chosen.value, 'o', ms=12, mfc='none')
    axes.set(xlabel=f'ms per image, network alone, {timed_on()}', ylabel=result.metric)
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110, format='png')
    plt.close(figure)
