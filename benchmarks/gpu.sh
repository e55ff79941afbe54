#!/usr/bin/env bash
# Checks and benchmarks on a machine with a CUDA device, without network, in twelve
# minutes. Run it from the repository's root:
#
#     benchmarks/gpu.sh [--smoke] [RESULTS]
#
# The machine needs torch and torchvision. For the federations, which need Flower, fill
# the folder .wheels beforehand, on a machine with a network (benchmarks/carry.sh), and
# carry it along. DATA names the photographs (a folder, or a tar file of one) and TEACHER
# the folder of an open_clip model; without them the federations train on drawn images.
# Results go to benchmarks/results, or to the folder given.
#
# --smoke runs everything on the CPU with tiny sizes, to test this script.
set -euo pipefail
cd "$(dirname "$0")/.."
smoke=
if [[ ${1:-} == --smoke ]]; then
    smoke=1
    shift
fi
results=${1:-benchmarks/results}
python=${PYTHON:-python3}
mkdir -p "$results"

if [[ -d .wheels ]]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile \
        --disable-pip-version-check --target "$site" .wheels/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

failed=0
# Run a part for at most so many seconds; the others follow in any case.
part() {
    local seconds=$1
    shift
    echo "== $*"
    timeout --kill-after=10 "$seconds" "$@" || {
        echo "== failed: $*"
        failed=1
    }
}

if [[ $smoke ]]; then
    part 600 "$python" -m benchmarks.recorded --device cpu --tiny --repeats 1 \
        --results "$results"
    part 600 "$python" -m benchmarks.federations --device cpu --workers 2 \
        --seconds 500 --results "$results"
    exit "$failed"
fi

photographs=()
if [[ ${DATA:-} ]]; then
    photographs=(--data "$DATA" --teacher "${TEACHER:?names the folder of a teacher}")
fi
part 90 "$python" -m tests.cuda.checks \
    > >(tee "$results/$(date +%F)-gpu-checks.txt")
part 90 "$python" -m benchmarks.recorded --repeats 3 --results "$results"
part 390 "$python" -m benchmarks.federations --seconds 340 --results "$results" \
    "${photographs[@]}"
part 130 "$python" -m benchmarks.stages --device cuda --repeats 1 --results "$results"
exit "$failed"
