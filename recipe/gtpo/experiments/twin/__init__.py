"""The embedded training run in plain PyTorch, for questions that take many seeds: no verl, no Ray, a second a step.

    python -m recipe.gtpo.experiments.twin method=gtpo seed=1 run_dir=outputs/twin/gtpo-seed1 [hydra overrides]

It composes the same config as `recipe.gtpo.main` and reads the same keys; an override that it does not read is refused.
What decides the result is the recipe's own: problems, warm start, decisions of the rollout (`conversation.py`),
shaping, turn rewards, advantages. What differs from the run under verl:

1. One process samples and trains, so there is no weight transfer and no gap between rollout and actor.
2. The tool is `recipe.gtpo.tasks.arithmetic.calculator`; no code is executed.
3. Decoding is written out (`decoder.py`); a tool message is fed through it token by token like a sampled turn.
4. Rows whose advantages are all 0 skip the backward pass. Their gradient is 0; the loss still divides by their tokens.
5. Problems come straight from the task's stream, not from its parquet file; held-out ones are the same for all seeds.
6. The last validation takes `task.final_problems`, because the last point carries the claim.

Leaves metrics.jsonl and summary.json as a run under verl does, with the same names (recipe/gtpo/run/record.py), so that
the report reads both. Only here: `val-class/<problem class>/...`, and `val-aux/.../greedy_acc/...`.

- `settings`: what is read from the config, and what is refused.
- `rollout`, `decoder`: from problems to finished conversations.
- `training`: credit, update, validation, the loop.
"""
