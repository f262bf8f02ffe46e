#!/usr/bin/env bash
# Train methods x seeds (x horizons), then make a report: learning curves, paired differences, credit by turn.
#
#   bash examples/compare_baselines.sh                                          # methods=fair: 10 methods, seeds 0 to 4
#   bash examples/compare_baselines.sh experiment=horizon6 parallel=2           # a published result
#   bash examples/compare_baselines.sh methods=gtpo,grpo,gtpo_turn seeds=1..8 steps=40
#   bash examples/compare_baselines.sh engine=twin seeds=1..16 parallel=2       # plain PyTorch, no verl: minutes a cell
#   bash examples/compare_baselines.sh engine=twin seeds=1..16 horizons=1..6    # also by the length of the chain of calls
#   bash examples/compare_baselines.sh ray=http://HEAD:8265 parallel=4 hardware=multi_node trainer.nnodes=1 \
#     task=verl_data ...                                   # Ray jobs, four at once: 4 nodes of 8 GPUs, a node a cell
#
# All keys and their defaults: recipe/gtpo/experiments/compare.py. Other arguments go to every run, as on
# run_gtpo_qwen.sh's command line. The same command goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/stack.sh "$@"
bash examples/setup_env.sh "$STACK" "${EXTRAS[@]}"
exec "$VENV/bin/python" -m recipe.gtpo.experiments.compare stack="${ARGS[*]}" "$@"
