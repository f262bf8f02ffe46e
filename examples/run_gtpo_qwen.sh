#!/usr/bin/env bash
# Train with GTPO on this machine: makes the environment, then runs. Arguments are Hydra overrides, later ones win.
#
#   bash examples/run_gtpo_qwen.sh                                       # no GPU: the embedded default, minutes
#   bash examples/run_gtpo_qwen.sh method=grpo seed=2                    # a baseline, another seed
#   bash examples/run_gtpo_qwen.sh algorithm.gtpo.baseline=turn          # any option of GTPO or of verl
#   ROLLOUT=sglang bash examples/run_gtpo_qwen.sh hardware=single_node   # GPU, SGLang instead of vLLM
#
# ROLLOUT   vllm | sglang, with a GPU (default: vllm)
# HARDWARE  cpu | single_gpu | single_node | multi_node (default: what nvidia-smi shows)
# VENV, PYTHON  see setup_env.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
case ${HARDWARE:-} in
  "") if ((gpus == 0)); then HARDWARE=cpu; elif ((gpus < 8)); then HARDWARE=single_gpu; else HARDWARE=single_node; fi ;;
esac
for argument in "$@"; do
  case $argument in hardware=*) HARDWARE=${argument#hardware=} ;; esac
done

ARGS=(hardware="$HARDWARE")
if [[ $HARDWARE == cpu ]]; then
  STACK=cpu
  ARGS+=(rollout=transformers)
  # glibc gives large freed tensors back to the system at once and faults them in again at the next step.
  export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
else
  STACK=${ROLLOUT:-vllm}
  ARGS+=(rollout="$STACK")
fi

bash examples/setup_env.sh "$STACK"
exec "${VENV:-.venv}/bin/python" -m recipe.gtpo.main "${ARGS[@]}" "$@"
