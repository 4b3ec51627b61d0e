#!/usr/bin/env bash
# Makes a virtual environment with one of the two tested stacks and this package.
# usage: tools/setup_env.sh onedl|openmmlab VENV [PYTHON]
# Done once. An interrupted set-up continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."

stack=${1:?usage: tools/setup_env.sh onedl|openmmlab VENV [PYTHON]}
venv=${2:?usage: tools/setup_env.sh onedl|openmmlab VENV [PYTHON]}
python=${3:-python3}
pins=requirements/$stack.txt
[ -f "$pins" ] || { echo "setup: unknown stack '$stack': expected onedl or openmmlab" >&2; exit 2; }

stamp=$venv/.ready
ready=$(cat "$pins" pyproject.toml setup.py dn_mmdet/kernels/csrc/*.cpp "$0" | cksum)
[ "$(cat "$stamp" 2>/dev/null)" = "$ready" ] && exit 0

# --- name what is missing before anything is downloaded ---
missing=()
command -v g++ >/dev/null || missing+=(g++)
if command -v "$python" >/dev/null; then
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || {
        echo "setup: $python is $("$python" -V 2>&1); expected Python 3.10 to 3.12 (tested: 3.11)." \
             "Name another: make PYTHON=python3.11 ..." >&2; exit 2; }
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
    "$python" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
        || missing+=(python3-dev)
else
    missing+=(python3 python3-venv python3-dev)
fi
if [ ${#missing[@]} -gt 0 ]; then
    echo "setup: MMCV's operators are compiled here, which needs: ${missing[*]}." \
         "On Debian: sudo apt-get install ${missing[*]}" >&2
    exit 2
fi

version() { sed -n "s/^$1==//p" "$pins"; }
case $stack in onedl) prefix=onedl-; mmdet=onedl-mmdetection ;; *) prefix=; mmdet=mmdet ;; esac
mmcv=${prefix}mmcv==$(version "${prefix}mmcv")
jobs=$(env -u OMP_NUM_THREADS nproc)  # nproc prints OMP_NUM_THREADS, where that is set

echo "Setting up $venv: torch $(version torch), $mmdet $(version $mmdet), $mmcv."
echo "This is done once. It downloads about 5 GB, and compiles MMCV's operators: about 12 minutes on 2 cores."
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
step() { echo "[$(date +%H:%M:%S)] $*"; }

step "1/4 virtual environment, torch and torchvision"
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
pip install -q -c "$pins" torch torchvision setuptools wheel ninja psutil

# mmcv.ops fails to import where the operators are missing or were compiled for another torch.
mmcv_works() { "$venv/bin/python" -W ignore -c 'import mmcv.ops, torchvision' 2>/dev/null; }

# pip -v passes ninja's "[12/150] c++ ..." lines on; they become a progress line with an ETA.
compile_mmcv() {
    pip install -v -c "$pins" --no-build-isolation "$mmcv" 2>&1 | tee "$venv/mmcv.log" | awk -v start="$(date +%s)" '
        match($0, /^ *\[[0-9]+\/[0-9]+\] /) {
            split(substr($0, RSTART, RLENGTH), part, /[^0-9]+/)
            "date +%s" | getline now; close("date +%s")
            if (now - last >= 20 || part[2] == part[3]) {
                printf "    compiled %d of %d files, about %d min left\n", part[2], part[3],
                    (now - start) * (part[3] - part[2]) / part[2] / 60 + 0.5
                fflush(); last = now
            }
        }'
}

step "2/4 $mmcv (a wheel from an earlier set-up is reused)"
if ! mmcv_works; then
    export MMCV_WITH_OPS=1 MAX_JOBS=$jobs
    compile_mmcv || { tail -n 30 "$venv/mmcv.log" >&2
                      echo "setup: installing $mmcv failed; the whole log is $venv/mmcv.log" >&2; exit 1; }
    if ! mmcv_works; then
        step "    the cached wheel was compiled for another torch: compiling it again"
        pip cache remove "${mmcv%%==*}" >/dev/null || true
        pip uninstall -q -y "${mmcv%%==*}"
        compile_mmcv
    fi
fi

step "3/4 MMDetection, this package and the packages for its tests"
# The CPU kernels are compiled against the installed torch, which build isolation would hide.
pip install -q -c "$pins" --no-build-isolation -e ".[$stack,cls,demo,experiments,export,tests]"

step "4/4 checking that everything imports"
"$venv/bin/python" -W ignore -c 'import mmcv.ops, torchvision, mmdet, dn_mmdet.kernels.cpp_ops'
echo "$ready" > "$stamp"
step "$venv is ready"
