"""A training step of nine of SSDLite's norm layers, eager and under torch.compile.

In inverted residual blocks, since Inductor fuses a norm with what stands around it.
"""

import gc
import statistics
import time

import torch
from torch import nn

from . import parity
from .rows import beside_bn, make_row, matching
from .timing import Deadline, allocations, alternate, synchronize
from .variants import BN, DN, Setting, Variant, make_layer, wake

# (channels, channels inside, height) of a block each of SSDLite-MobileNetV2 at 320 px.
BLOCKS = (24, 144, 80), (32, 192, 40), (96, 576, 20)
MODES = {'eager': None, 'compiled': {}, 'reduce-overhead': dict(mode='reduce-overhead')}


class Block(nn.Module):
    """MobileNetV2's, with three norms."""

    def __init__(self, variant: Variant, channels: int, inside: int):
        super().__init__()
        self.expand = nn.Conv2d(channels, inside, 1, bias=False)
        self.norm1 = make_layer(variant, inside)
        self.depthwise = nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False)
        self.norm2 = make_layer(variant, inside)
        self.project = nn.Conv2d(inside, channels, 1, bias=False)
        self.norm3 = make_layer(variant, channels)

    def forward(self, x):
        y = nn.functional.relu6(self.norm1(self.expand(x)))
        y = nn.functional.relu6(self.norm2(self.depthwise(y)))
        return x + self.norm3(self.project(y))


class Blocks(nn.Module):
    """A block for each map, in one graph."""

    def __init__(self, variant: Variant, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(Block(variant, *channels) for *channels, _ in blocks)

    def forward(self, maps):
        return [block(x) for block, x in zip(self.blocks, maps, strict=True)]


class TrainingStep:
    """Forward, and the gradient of every parameter, of `Blocks` in one mode.

    The same weights for every variant of a norm, and for BN as far as it has them.

    Args:
        mode: one of `MODES`.
        dtype: of all of it, without autocast; None for that of the setting.
    """

    def __init__(
        self,
        setting: Setting,
        batch: int,
        blocks,
        variant: Variant,
        mode: str,
        dtype: torch.dtype | None = None,
    ):
        self.setting = setting if dtype is None else Setting(setting.device)
        model = Blocks(variant, blocks)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    shape = module.weight.shape
                    module.weight.copy_(
                        torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
                    )
        self.model = wake(model).to(  # type: ignore[call-overload]  # it takes memory_format
            setting.device, dtype, memory_format=setting.format
        )
        self.parameters = dict(self.model.named_parameters())
        self.maps, self.dys = (
            [
                torch.randn(batch, channels, height, height, generator=generator).to(
                    setting.device, dtype or setting.dtype, memory_format=setting.format
                )
                for channels, _, height in blocks
            ]
            for _ in range(2)
        )
        self.run = self.model
        options = MODES[mode]
        if options is not None:
            self.run = torch.compile(  # type: ignore[call-overload]  # the options differ in type
                self.model, fullgraph=True, dynamic=False, **options
            )

    def __call__(self):
        """The outputs, and the gradients in the parameters' order."""
        torch.compiler.cudagraph_mark_step_begin()
        with self.setting.autocast():
            ys = self.run(self.maps)
        return ys, torch.autograd.grad(ys, list(self.parameters.values()), self.dys)

    def results(self) -> dict:
        """All that a step gives, by kind and name; the averages start at their beginning."""
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
        ys, gradients = self()
        found = dict(
            outputs=dict(enumerate(ys)),
            gradients=dict(zip(self.parameters, gradients, strict=True)),
            averages={name: t for name, t in self.model.named_buffers() if t.is_floating_point()},
        )
        return {
            kind: {name: t.detach().double().clone() for name, t in tensors.items()}
            for kind, tensors in found.items()
        }


def errors(found: dict, exact: dict) -> dict:
    """By kind: the root mean square of the relative errors of all tensors."""
    return {
        kind: statistics.fmean(
            parity.relative_error(found[kind][name], wanted) ** 2
            for name, wanted in tensors.items()
        )
        ** 0.5
        for kind, tensors in exact.items()
    }


def check_step(step: TrainingStep, exact: dict, own: dict, where: str) -> None:
    """Raises ParityError where a step's results are not those of float64.

    Allowed is the tolerance, or twice what plain PyTorch in the same precision is off: where a
    ReLU's input is near its corner, rounding alone decides.

    Args:
        exact: results of the reference in float64.
        own: the errors of the reference in the setting's dtype.
    """
    for _ in range(3):  # CUDA graphs are warmed up, recorded, replayed
        for kind, error in errors(step.results(), exact).items():
            allowed = max(parity.LAYER_TOLERANCE[step.setting.dtype], 2 * own[kind])
            if not error <= allowed:
                raise parity.ParityError(
                    f'{where}: {kind} differ from the reference by {error:.2g} of their norms '
                    f'(allowed {allowed:.2g}); nothing is timed'
                )


def sizes(image: int = 320) -> list[tuple[int, int, int]]:
    """`BLOCKS` for images of this height and width in pixels, without maps below 8 x 8."""
    return [
        (channels, inside, height * image // 320)
        for channels, inside, height in BLOCKS
        if height * image // 320 >= 8
    ]


def run_blocks(setting: Setting, batch: int, blocks, variants) -> None:
    """Runs a step of each, eager and as an operator, so that its kernels are compiled."""
    for variant in variants:
        for block in blocks:
            step = TrainingStep(setting, batch, [block], variant, 'eager')
            step()
            torch.compiler.reset()
            step.run = torch.compile(step.model, backend='eager')  # Inductor's code comes later
            step()
    synchronize(setting.device)


def measure_compiled(
    setting: Setting,
    batch: int,
    norms,
    image: int = 320,
    deadline: Deadline | None = None,
    failures: list | None = None,
) -> list[dict]:
    """Rows of a training step of `Blocks`: eager, compiled, and replayed from CUDA graphs.

    ``task`` of a row names the mode, and its ``of BN`` compares with BN in that mode.

    Args:
        image: height and width in pixels; see `sizes`.
        deadline: a mode that it cuts off is a failure.

    Raises:
        ParityError: an output, a gradient or a running average is not the reference's.
    """
    deadline, failures = deadline or Deadline(), [] if failures is None else failures
    blocks = sizes(image)
    norms = [v for v in norms if v == BN or v.norm in DN]
    references = {
        norm: _reference(setting, batch, blocks, norm) for norm in {v.norm for v in norms}
    }
    rows = []
    for mode in MODES:
        torch.compiler.reset()  # else the eighth model counts as a recompilation too many
        steps, held, compiling = {}, {}, {}
        for variant in norms:
            if deadline.passed():
                failures.append(
                    f'compiled, batch {batch}, {setting}: no time left for {variant.label}, {mode}'
                )
                continue
            before, start = _reserved(setting), time.perf_counter()
            steps[variant] = TrainingStep(setting, batch, blocks, variant, mode)
            where = f'{variant.label}, {mode}, {setting}'
            exact, own = references[variant.norm]
            check_step(steps[variant], exact, own, where)
            compiling[variant] = time.perf_counter() - start
            held[variant] = _held_in(steps[variant], before)
        if BN in steps:
            rows += _rows(mode, steps, held, compiling, setting, batch, 3 * len(blocks))
        del steps
        gc.collect()
    return rows


def _reference(setting, batch, blocks, norm):
    """What plain PyTorch gives in float64, and the errors that it has in the setting's dtype."""
    plain = BN if norm == BN.norm else Variant(norm, 'reference')
    exact = TrainingStep(setting, batch, blocks, plain, 'eager', torch.float64).results()
    found = TrainingStep(setting, batch, blocks, plain, 'eager').results()
    return exact, errors(found, exact)


def _rows(mode, steps, held, compiling, setting, batch, layers):
    rows = []
    seconds = alternate(steps, setting)
    for variant in steps:
        at = dict(part='compiled', task=mode, batch=batch, variant=variant, layers=layers)
        rows += beside_bn(at, 'time', 's', seconds[variant], seconds[BN])
        rows += beside_bn(at, 'peak memory', 'bytes', [held[variant]], [held[BN]])
        if mode != 'eager':
            rows.append(make_row(at, 'first steps', 's', [compiling[variant]]))
    return rows


def _reserved(setting):
    """Bytes that PyTorch holds on the GPU, those of CUDA graphs among them."""
    if setting.device != 'cuda':
        return 0
    synchronize(setting.device)
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def _held_in(step, before):
    """The most bytes that a step, its model and its graphs hold."""
    if step.setting.device != 'cuda':
        return allocations(step, step.setting.device)[2]
    _reserved(step.setting)
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize(step.setting.device)
    return torch.cuda.max_memory_reserved() - before


def compiled_table(rows) -> str:
    """The rows of `measure_compiled` as a table of milliseconds and megabytes, in Markdown."""
    variants = list(dict.fromkeys((row['norm'], row['backend']) for row in rows))
    names = [' '.join(filter(None, v)) for v in variants]
    lines = [f'| ms (MB) | {" | ".join(names)} |', f'|---|{"--:|" * len(names)}']
    for mode in MODES:
        cells = []
        for norm, backend in variants:
            mine = matching(rows, task=mode, norm=norm, backend=backend)
            found = {row['measure']: row['median'] for row in mine if row['unit'] != 'of BN'}
            cells.append(
                f'{1e3 * found["time"]:.2f} ({found["peak memory"] / 2**20:.0f})'
                if found
                else 'not measured'
            )
        lines.append(f'| {mode} | {" | ".join(cells)} |')
    return '\n'.join(lines)
