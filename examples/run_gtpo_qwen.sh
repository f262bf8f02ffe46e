#!/usr/bin/env bash
# Train with GTPO on this machine: makes the environment, then runs. Arguments are Hydra overrides, later ones win.
#
#   bash examples/run_gtpo_qwen.sh                                       # no GPU: the embedded default, minutes
#                                                                        # with: Qwen2.5, as large as fits, on task=math
#   bash examples/run_gtpo_qwen.sh method=grpo seed=2                    # a baseline, another seed
#   bash examples/run_gtpo_qwen.sh algorithm.gtpo.baseline=turn          # any option of GTPO or of verl
#   bash examples/run_gtpo_qwen.sh model=smollm2 task=reasoning_gym      # no GPU: a small real model, real text
#   bash examples/run_gtpo_qwen.sh rollout=vllm_cpu run_dir=outputs/vllm # no GPU: verl's own vLLM server
#   ROLLOUT=sglang bash examples/run_gtpo_qwen.sh hardware=single_node   # GPU, SGLang instead of vLLM
#
# ROLLOUT, HARDWARE  see stack.sh
# VENV, PYTHON       see setup_env.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/stack.sh "$@"
bash examples/setup_env.sh "$STACK" "${EXTRAS[@]}"
python=$VENV/bin/python
# On GPUs mathematics is the default, and the only one whose data are fetched here. The model: recipe/gtpo/run/gpu.py.
if [[ $STACK != cpu && $STACK != vllm_cpu && " $*" != *" task="* && " $*" != *" experiment="* ]]; then
  ARGS+=(task=math)
  [[ " $*" == *" task.folder="* || -f outputs/data/math/manifest.json ]] || "$python" -m recipe.gtpo.data prepare task=math
fi
exec "$python" -m recipe.gtpo.main "${ARGS[@]}" "$@"
