#!/usr/bin/env bash
# On a CUDA machine: the GPU tests, then the benchmark at batch 24 and 192, in float32 and
# float16 under autocast, contiguous and channels_last.
# usage: [PYTHON=python3] tools/gpu_check.sh [FOLDER]   (default: work_dirs/gpu_check)
# Leaves tests.txt, benchmark_gpu.csv and table.txt there. Where MMDetection is missing, the
# layers alone are timed. Ends with 1 if a test, a parity check or a timing failed.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-work_dirs/gpu_check}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "gpu_check: torch of $python is missing or sees no CUDA device here." \
         "Name another: PYTHON=... $0" >&2; exit 2; }
"$python" -c 'import mmengine, triton, pytest, pytest_timeout, hypothesis' || {
    echo "gpu_check: install what is missing: $python -m pip install mmengine triton pytest" \
         "pytest-timeout hypothesis" >&2; exit 2; }
mkdir -p "$folder" || exit 2
failed=0

# These need no mmdet.
tests=(tests/test_kernels.py tests/test_triton_ops.py tests/test_functional.py)
echo "GPU tests: $folder/tests.txt"
"$python" -m pytest -q -m gpu "${tests[@]}" > "$folder/tests.txt" 2>&1 || failed=1
tail -n 1 "$folder/tests.txt"

parts=(layers)
if "$python" -W ignore -c 'import mmcv.ops, mmdet' 2>/dev/null; then
    parts+=(detector)
else
    echo "MMDetection or MMCV's operators cannot be imported: the layers alone are timed."
fi
csv=$folder/benchmark_gpu.csv
rm -f "$csv"
: > "$folder/table.txt"
for batch in 24 192; do
    for amp in '' --amp; do
        for layout in '' --channels-last; do
            echo "benchmark: batch $batch ${amp:-float32} ${layout:-contiguous}"
            # the compiled reference compiles anew for each shape: once is enough
            compiled=0; [ "$batch$amp$layout" = 192 ] && compiled=3
            # shellcheck disable=SC2086  # empty options are none
            "$python" -W ignore tools/benchmark.py --device cuda --batch "$batch" $amp $layout \
                --compiled $compiled --parts "${parts[@]}" --csv "$csv" \
                >> "$folder/table.txt" || failed=1
            echo >> "$folder/table.txt"
        done
    done
done
cat "$folder/table.txt"
[ $failed = 0 ] || echo 'gpu_check: something failed; see above and tests.txt' >&2
exit $failed
