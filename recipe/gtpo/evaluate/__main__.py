"""Evaluate a model with its tools, on benchmarks, as a run's own validation would.

    python -m recipe.gtpo.evaluate model=outputs/arithmetic-gtpo-seed1 benchmarks=arithmetic samples=4 compare=base
    python -m recipe.gtpo.evaluate model=Qwen/Qwen2.5-3B-Instruct benchmarks=aime24 hardware=single_gpu rollout=vllm
    python -m recipe.gtpo.evaluate model=Qwen/Qwen2.5-3B-Instruct benchmarks=gsm8k endpoint=http://127.0.0.1:8000/v1

Keys:
    model         a run's folder (its last checkpoint), a checkpoint, a model's folder, or a hub name
    benchmarks    names with commas between them, or files with rows in verl's columns
    samples       attempts a problem                                              (each benchmark's own)
    compare       base: the model that the run began with; or another model       (none)
    endpoint      an OpenAI-compatible endpoint that serves the model, up to and with /v1, instead of servers of its own
    served_model  its name there (its only one); api_key_env: environment variable with a bearer token
    local         a folder with copies of the sets, <set>/<split>.jsonl           (prepared data, else the hub)
    temperature, top_p, concurrency, and every key of the run's config, such as hardware=, rollout=, run_dir=, seed=

The same command goes on where it was stopped. What it leaves: docs/evaluation.md.
"""

from __future__ import annotations

import signal
import sys


def main() -> int:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    from recipe.gtpo.run.environment import settle

    settle(sys.argv[1:])  # before hydra and verl are imported
    # Here and not above: processes that check answers import this module again (`run/processes.py`).
    from recipe.gtpo.evaluate.command import evaluate

    return evaluate(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
