#!/usr/bin/env bash
# The tests that need no GPU: makes the environment, then style, types, and the lanes unit and e2e.
#
#   bash tests/run.sh [pytest arguments]     for example: bash tests/run.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/setup_env.sh cpu dev smollm2
source examples/venv.sh
python=$(venv_of cpu)/bin/python
"$python" -m ruff check .
"$python" -m mypy
lanes=(-m "unit or e2e")
for argument in "$@"; do [[ $argument == -m ]] && lanes=(); done
# A browser for tests/e2e/test_viewer.py, where the machine has none and playwright's host answers; else they are skipped.
if ((${#lanes[@]})) && ! command -v chromium >/dev/null; then
  timeout 120 "$python" -m playwright install --only-shell chromium >/dev/null 2>&1 || echo "tests: no browser to be had"
fi
# Two tests at once, the trainings (tests/e2e) first; one thread a process: the tests start many processes on few cores.
OMP_NUM_THREADS=1 exec "$python" -m pytest "${lanes[@]}" -n 2 --dist loadgroup --no-loadscope-reorder --durations=15 "$@"
