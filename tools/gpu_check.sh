#!/usr/bin/env bash
# On a CUDA machine, in one call of at most five minutes: the GPU tests, then the benchmark of
# DN-B against BatchNorm, eager and GPU time alone, the most important settings first.
# usage: [PYTHON=python3] [SECONDS_IN_ALL=285] [STAGES="tests layers ..."] [COMMIT=hash] tools/gpu_check.sh [FOLDER]
# FOLDER (default: work_dirs/gpu_check) gets tests.txt, results.txt, benchmark_gpu.csv, table.txt,
# bars.txt, layers.png and log.txt. COMMIT says whose code this is where it is no git checkout.
# Each stage is a process of its own with a limit; one that fails does not stop the next. Ends
# with 1 if a test, a parity check or a timing failed or was cut off.
# DEVICE=cpu tries all of it in miniature on a machine without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-work_dirs/gpu_check}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
device=${DEVICE:-cuda}
stages=${STAGES:-build tests layers detector batch192 float32 backends}
end=$(($(date +%s) + ${SECONDS_IN_ALL:-285}))
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
export PYTHONDONTWRITEBYTECODE=  # compiled files save the later stages their imports
case $device in
    cuda) batch=24; large=192; workers=${WORKERS:-8}; compilers=${COMPILERS:-6}; mark=gpu
          slow=1; sizes=(); others=(DNB:triton DNB:torch DNB:reference) ;;
    cpu) batch=4; large=5; workers=${WORKERS:-2}; compilers=1; mark='not gpu and not slow'
         slow=4; sizes=(--size 64); others=(DNB:torch DNB:reference) ;;
    *) echo "gpu_check: DEVICE: expected cuda or cpu, got '$device'" >&2; exit 2 ;;
esac

# One look at what is here: importing torch and MMDetection takes seconds.
here=$("$python" -W ignore - << 'LOOK'
import contextlib
import torch
print('torch')
if torch.cuda.is_available():
    print('cuda')
with contextlib.suppress(ImportError):
    import hypothesis, mmengine, pytest, pytest_timeout, triton, xdist
    print('test-tools')
with contextlib.suppress(Exception):
    import dn_mmdet.kernels.cpp_ops, dn_mmdet.kernels.host  # which refuse what was built earlier
    print('extensions')
with contextlib.suppress(Exception):
    import mmcv.ops, mmdet
    print('mmdet')
LOOK
)
found() { grep -qx "$1" <<< "$here"; }
found torch && { found cuda || [ "$device" = cpu ]; } || {
    echo "gpu_check: torch of $python is missing or sees no CUDA device here." \
         "Name another: PYTHON=... $0" >&2; exit 2; }
found test-tools || {
    echo "gpu_check: install what is missing: $python -m pip install mmengine triton pytest" \
         "pytest-timeout pytest-xdist hypothesis" >&2; exit 2; }
mkdir -p "$folder" || exit 2
csv=$folder/benchmark_gpu.csv
results=("$csv" "$folder"/{tests,results,table,bars,log}.txt "$folder/layers.png")
if ! [ -e "$folder/table.txt" ] || ! [ -e "$folder/bars.txt" ]; then  # which each check leaves
    for file in "${results[@]}"; do
        [ ! -e "$file" ] || { echo "gpu_check: $file: exists already, and no check of the GPU has" \
                                   "written it. Name another folder: $0 FOLDER" >&2; exit 2; }
    done
fi
rm -f "${results[@]}"
: > "$folder/table.txt"
: > "$folder/bars.txt"
failed=()

left() { echo $((end - $(date +%s))); }
wanted() { [[ " $stages " == *" $1 "* ]]; }
exec 3>&1  # what is said is seen, wherever a command's own output goes
say() { echo "[$(left) s left] $*" >&3; }

# limited NAME SECONDS COMMAND...: runs it for so long, or for what is left; notes a failure.
limited() {
    local name=$1 seconds=$2 code
    shift 2
    [ "$seconds" -lt "$(left)" ] || seconds=$(left)
    if [ "$seconds" -lt 8 ]; then
        say "$name: CUT, no time left"; failed+=("$name (cut)"); return 1
    fi
    say "$name"
    timeout -k 3 "$seconds" "$@"
    code=$?
    [ $code = 0 ] && return 0
    [ $code = 124 ] || [ $code = 137 ] && name+=" (stopped after $seconds s)"
    failed+=("$name"); say "$name: FAILED ($code)"
    return $code
}

# bench NAME SECONDS OPTIONS...: one benchmark; its rows go to the CSV, its table to table.txt.
bench() {
    local name=$1 seconds=$(($2 * slow))
    shift 2
    limited "$name" $((seconds + 15)) "$python" -W ignore tools/benchmark.py --device "$device" \
        "${sizes[@]}" --pairs "${PAIRS:-7}" --seconds "$seconds" --csv "$csv" \
        ${COMMIT:+--commit "$COMMIT"} "$@" >> "$folder/table.txt" 2>> "$folder/log.txt" ||
        tail -n 4 "$folder/log.txt" | cut -c1-300
}

if wanted build && ! found extensions; then
    limited build 100 "$python" setup.py -q build_ext --inplace >> "$folder/log.txt" 2>&1
fi

# The tests, and beside them what only compiles kernels: neither is timed.
# Python 3.12 warns of escapes in the strings of MMDetection where it compiles the files first.
if wanted tests; then
    tests=()
    for file in tests/test_{gpu,host}_*.py tests/test_{kernels,functional,operators,triton_ops,tuning}.py; do
        [ "$file" != tests/test_gpu_check.py ] && [ -f "$file" ] && tests+=("$file")
    done
    [ -z "${TESTS:-}" ] || read -ra tests <<< "$TESTS"
    seconds=${TEST_SECONDS:-80}
    compiling=()
    if wanted layers; then
        for ((i = 1; i <= compilers; i++)); do
            timeout -k 3 "$seconds" "$python" -W ignore tools/benchmark.py --device "$device" \
                "${sizes[@]}" --batch "$batch" --norms BN DNB:auto --compile-only "$i/$compilers" \
                >> "$folder/log.txt" 2>&1 &
            compiling+=($!)
        done
    fi
    PYTHONPATH=$PYTHONPATH:$PWD/tests limited tests $((seconds + 15)) "$python" -m pytest -q -m "$mark" \
        "${tests[@]}" -n "$workers" --max-worker-restart=100 -p cuda_isolation \
        -p no:benchmark -p no:cacheprovider -W ignore::SyntaxWarning --timeout=60 --timeout-method=thread --tb=short \
        --results "$folder/results.txt" --stop-after "$seconds" > "$folder/tests.txt" 2>&1
    grep -E '^(FAILED|ERROR) ' "$folder/tests.txt" | cut -c1-160 | head -n 25
    for pid in "${compiling[@]}"; do wait "$pid" || true; done
fi

fast=(--norms BN DNB:auto)
if wanted layers; then
    bench "layers, float16, contiguous" 40 --batch $batch --amp --parts layers step host "${fast[@]}"
    bench "layers, float16, channels_last" 40 --batch $batch --amp --channels-last --parts layers step host "${fast[@]}"
fi
whole=0
if found mmdet; then whole=1; elif wanted detector; then
    failed+=("detector (mmdet or mmcv.ops cannot be imported)")
fi
if [ $whole = 1 ] && wanted detector; then
    bench "SSDLite, float16, channels_last" 35 --batch $batch --amp --channels-last --parts detector "${fast[@]}"
    bench "SSDLite, float16, contiguous" 35 --batch $batch --amp --parts detector "${fast[@]}"
fi
if wanted batch192; then
    bench "layers, float16, channels_last, batch $large" 25 --batch $large --amp --channels-last --parts layers "${fast[@]}"
    bench "layers, float16, contiguous, batch $large" 25 --batch $large --amp --parts layers "${fast[@]}"
    [ $whole = 0 ] || bench "SSDLite, float16, channels_last, batch $large" 25 --batch $large --amp \
        --channels-last --parts detector --inference-batch $large "${fast[@]}"
fi
if wanted float32; then
    bench "layers, float32, contiguous" 25 --batch $batch --parts layers step host "${fast[@]}"
    bench "layers, float32, channels_last" 25 --batch $batch --channels-last --parts layers step host "${fast[@]}"
    [ $whole = 0 ] || bench "SSDLite, float32, contiguous" 25 --batch $batch --parts detector "${fast[@]}"
fi
if wanted backends; then
    bench "other backends, float16, contiguous" 30 --batch $batch --amp --parts layers host \
        --norms BN DNB:auto "${others[@]}"
fi
if wanted compiled; then  # torch.compile, where asked for: a process for each block compiles kernels first
    compiling=()
    for ((i = 1; i <= 3; i++)); do
        limited "compiled, kernels $i" 60 "$python" -W ignore tools/benchmark.py --device "$device" "${sizes[@]}" \
            --batch $batch --amp --channels-last --parts compiled "${fast[@]}" --compile-only $i/3 \
            >> "$folder/log.txt" 2>&1 &
        compiling+=($!)
    done
    for pid in "${compiling[@]}"; do wait "$pid" || true; done
    bench "torch.compile, float16, channels_last" 60 --batch $batch --amp --channels-last --parts compiled "${fast[@]}"
fi
if wanted float32; then  # what matters least
    bench "layers, float32, contiguous, batch $large" 25 --batch $large --parts layers "${fast[@]}"
    bench "layers, float32, channels_last, batch $large" 25 --batch $large --channels-last --parts layers "${fast[@]}"
fi

end=$((end + 20))  # the table of what there is comes in any case
if [ -s "$csv" ]; then
    limited table 20 "$python" -W ignore tools/benchmark.py --bars "$csv" \
        --plot "$folder/layers.png" >> "$folder/bars.txt" 2>> "$folder/log.txt"
fi
[ ! -s "$folder/tests.txt" ] || echo "GPU tests: $(tail -n 1 "$folder/tests.txt")" >> "$folder/bars.txt"
cat "$folder/bars.txt"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'gpu_check: failed: %s\n' "${failed[@]}" | tee -a "$folder/bars.txt" >&2
    exit 1
fi
echo "gpu_check: nothing failed; $folder has the results"
