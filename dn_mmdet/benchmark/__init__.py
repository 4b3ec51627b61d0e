"""Times norms against BatchNorm: layer by layer, and in SSDLite-MobileNetV2 as a whole.

Before anything is timed, every Dynamic Normalization that takes part is compared with the
reference, with SC awake; one that is off raises, and there are no figures at all.

Each round runs all variants once, every other round in the opposite order, and gives one
ratio to BatchNorm per variant, so that a machine that slows down slows both. A result is the
median of the ratios; quantiles say how far rounds differ.

On a GPU a call is timed three times: eager, as training runs it; on the GPU alone, replayed
from a CUDA graph; and on the host alone, which never waits for the GPU.
"""

from .bars import bars_table
from .compiled import compiled_table, measure_compiled, run_blocks, sizes
from .detectors import CONFIG, Detectors
from .layers import (
    by_size,
    check_layers,
    measure_host,
    measure_layers,
    measure_step,
    run_layers,
    ssdlite_shapes,
)
from .parity import ParityError
from .provenance import provenance
from .report import plot, plot_gpu, table
from .rows import FIELDS, read_rows, write_rows
from .timing import LONG_ENOUGH, Deadline, GraphError, allocations, alternate, gpu_alone
from .tuning import compile_tunings, measure_tunings, tuning_table
from .variants import (
    BN,
    COMPILED,
    FOLDED,
    GN,
    REFERENCE,
    Setting,
    Variant,
    make_layer,
    parse_variant,
)

__all__ = [
    'BN',
    'COMPILED',
    'CONFIG',
    'Deadline',
    'Detectors',
    'FIELDS',
    'FOLDED',
    'GN',
    'GraphError',
    'LONG_ENOUGH',
    'ParityError',
    'REFERENCE',
    'Setting',
    'Variant',
    'allocations',
    'alternate',
    'bars_table',
    'by_size',
    'check_layers',
    'compile_tunings',
    'compiled_table',
    'gpu_alone',
    'make_layer',
    'measure_compiled',
    'measure_host',
    'measure_layers',
    'measure_step',
    'measure_tunings',
    'parse_variant',
    'plot',
    'plot_gpu',
    'provenance',
    'read_rows',
    'run_blocks',
    'run_layers',
    'sizes',
    'ssdlite_shapes',
    'table',
    'tuning_table',
    'write_rows',
]
