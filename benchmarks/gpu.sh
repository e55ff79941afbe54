#!/usr/bin/env bash
# Checks and benchmarks on a machine with a CUDA device that holds torch and torchvision
# only, in under nine minutes: run it from the repository's root. Results go to
# benchmarks/results, or to the folder given.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
mkdir -p "$results"

python3 -m tests.cuda.checks | tee "$results/$(date +%F)-gpu-checks.txt"
timeout 480 python3 -m benchmarks.stages --device cuda --repeats 5 --results "$results"
