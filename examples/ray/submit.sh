#!/usr/bin/env bash
# Submit one training to a Ray cluster that runs, as a job: its driver runs on the head node.
#
#   RAY=http://HEAD:8265 bash examples/ray/submit.sh trainer.nnodes=2 task=math \
#     actor_rollout_ref.model.path=Qwen/Qwen2.5-7B-Instruct
#
# Repository, environment, data and outputs are paths that all nodes share. Arguments are Hydra overrides. A cluster:
# cluster.yaml beside this, or by hand, on every node, with one token (`ray get-auth-token --generate`) on all of them:
#   export RAY_AUTH_MODE=token                                 # also where this script runs
#   ray start --head --port=6379 --dashboard-host=0.0.0.0      # on the first
#   ray start --address=HEAD:6379                              # on the others
#
# RAY      job server of the cluster  (http://HOST:8265)
# VENV     the environment            (default: .venv-vllm, or of the other stack)
# ROLLOUT  vllm | sglang              (default: vllm)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
HARDWARE=multi_node
source examples/stack.sh "$@"
bin=$(realpath "$VENV/bin")
exec "$bin/ray" job submit --address "${RAY:?the job server of a Ray cluster: RAY=http://HOST:8265}" -- \
  env --chdir="$PWD" "$bin/python" -m recipe.gtpo.main "${ARGS[@]}" "$@"
