"""What the viewer costs on a large run: `python benchmarks/viewer.py [--trajectories 100000] [--folder DIR]`.

Makes a run folder of generated trajectories (10 kB each, groups of 8, 1000 a step), starts the viewer on it, waits for
the index, and asks what a page asks. With --folder the run and its index stay there for another time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from verl_ext.records import VERSION

ROOT = Path(__file__).resolve().parents[1]
PER_STEP, GROUP, WORDS = 1000, 8, 5000


def generate(folder: Path, count: int) -> None:
    """Trajectories of two to four turns with words of a skewed vocabulary: some are rare, some everywhere."""
    draw = random.Random(0)
    words = [f"{draw.choice('bcdfghklmnprst')}{draw.choice('aeiou')}{draw.choice('lmnrst')}{at}" for at in range(WORDS)]
    weights = [1 / (rank + 1) for rank in range(WORDS)]

    def text(length: int) -> str:
        return " ".join(draw.choices(words, weights, k=length))

    (folder / "trajectories").mkdir(parents=True)
    for step in range(1, count // PER_STEP + 1):
        with (folder / "trajectories" / f"{step}.jsonl").open("w") as file:
            for row in range(PER_STEP):
                if row % GROUP == 0:
                    problem = f"Problem {step}-{row // GROUP}: {text(40)}"
                file.write(json.dumps(trajectory(draw, text, step, row, problem)) + "\n")


def trajectory(draw: random.Random, text: Callable[[int], str], step: int, row: int, problem: str) -> dict[str, Any]:
    """A record of today's version with all that a run under verl leaves, ids and gaps of its tokens among it."""
    turns, start = [], 0
    count = draw.randint(2, 4)
    solved = draw.random() < 0.5
    for k in range(count):
        last, tokens = k == count - 1, draw.randint(50, 250)
        outcome = draw.choices(["ok", "error", "timeout"], [90, 8, 2])[0]
        call = {"name": "python", "arguments": {"code": text(30)}, "error": None, "detail": ""}
        came = {"outcome": outcome, "output": text(20), "seconds": 0.1}
        broken = draw.choices([None, "no_answer" if last else "invalid_json"], [9, 1])[0]
        format_reward, returned = -0.1 if broken else 0.0, draw.gauss(0, 1)
        turns.append(
            {
                "start": start,
                "end": start + tokens,
                "text": text(tokens * 2 // 3),
                "calls": [] if last else [call],
                "outcomes": [] if last else [came],
                "broken": broken,
                "ended_by": "<|im_end|>",
                "overrun": 0,
                "token_ids": [draw.randrange(50_000) for _ in range(tokens)],
                "rewards": {"outcome": float(last and solved), "shaping": 0.0, "format": format_reward},
                "reward": float(last and solved) + format_reward,
                "return": returned,
                "pool_mean": 0.1,
                "pool_std": 0.5,
                "divisor": 0.5,
                "advantage": 2 * (returned - 0.1),
                "log_prob": -0.4,
                "log_prob_gap": 1e-6,
                "log_prob_gaps": [float(f"{draw.gauss(0, 1e-6):.3g}") for _ in range(tokens)],
            }
        )
        start += tokens + 20
    return {
        "version": VERSION,
        "step": step,
        "split": "train",
        "seed": 1,
        "group": f"{step}-{row // GROUP}",
        "session": row % GROUP,
        "index": row // GROUP,
        "data_source": "generated",
        "gold": "7",
        "weights": [step - 1, step - 1],
        "dropped": False,
        "turns": turns,
        "finish": draw.choices(["answer", "length"], [95, 5])[0],
        "acc": float(solved),
        "outcome": float(solved),
        "shaped": float(solved),
        "partners": [] if solved else [{"session": other, "similarity": 0.5} for other in range(GROUP // 2)],
        "pred": "7",
        "prompt": [{"role": "user", "content": problem}],
    }


class Viewer:
    """The command on a run folder. `ready` is the seconds until its first page was whole."""

    def __init__(self, folder: Path, cache: Path) -> None:
        began = time.perf_counter()
        environment = os.environ | {"XDG_CACHE_HOME": str(cache.resolve())}
        command = [sys.executable, "-m", "verl_ext.viewer", str(folder.resolve()), "--port", "0"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        for path in ("", "static/app.js", "static/style.css", "api/overview", "api/0/groups"):
            self.get(path)
        self.ready = time.perf_counter() - began

    def get(self, path: str, **parameters: Any) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(parameters)}", timeout=600) as answer:
            return answer.read()

    def seconds(self, path: str, questions: list[dict[str, Any]]) -> str:
        """Median and largest wall time of the questions, and the server's CPU time for one, in milliseconds."""
        process, taken = psutil.Process(self.process.pid), []
        cpu = -sum(process.cpu_times()[:2])
        for question in questions:
            began = time.perf_counter()
            self.get(path, **question)
            taken.append(1000 * (time.perf_counter() - began))
        cpu += sum(process.cpu_times()[:2])
        wall = f"median {statistics.median(taken):.0f} ms, largest {max(taken):.0f} ms"
        return f"{wall}; {1000 * cpu / len(taken):.0f} ms of CPU; {len(taken)} questions"

    @property
    def megabytes(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trajectories", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="where the run and its index are kept (default: nowhere)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.folder or Path(temporary)
        measure(base / "run", base / "cache", arguments.trajectories)


def measure(run: Path, cache: Path, count: int) -> None:
    if not run.exists():
        generate(run, count)
    size = sum(path.stat().st_size for path in (run / "trajectories").iterdir())
    print(f"{count} trajectories, {size / 1e6:.0f} MB")
    with Viewer(run, cache) as viewer:
        index(viewer, count, size)
    print(f"index: {sum(path.stat().st_size for path in cache.rglob('*.sqlite*')) / 1e6:.0f} MB")
    with Viewer(run, cache) as viewer:
        use(viewer, count)


def index(viewer: Viewer, count: int, size: int) -> None:
    """Until every trajectory is in the index, and then until it is known where the gradient of every step goes."""
    began, peak, steps = time.perf_counter(), 0.0, 0
    while steps < count // PER_STEP:
        peak = max(peak, viewer.megabytes)
        time.sleep(1)
        if json.loads(viewer.get("api/overview"))["runs"][0]["trajectories"] == count:
            steps = len({one["step"] for one in json.loads(viewer.get("api/0/gradient"))})
    taken = time.perf_counter() - began
    print(f"indexed in {taken:.0f} s ({size / 1e6 / taken:.0f} MB/s), served meanwhile; peak {peak:.0f} MB resident")


def use(viewer: Viewer, count: int) -> None:
    print(f"first page: {viewer.ready:.1f} s from the command; {viewer.megabytes:.0f} MB resident")
    flags = ["timeout", "tool error", "malformed", "truncated", "no answer", "all equal", "no first call"]
    orders = ["step", "latest", "spread", "largest", "tokens", "least solved"]
    print(
        "filter:", viewer.seconds("api/0/groups", [{"flag": flag, "sort": sort} for flag in flags for sort in orders])
    )
    words = json.loads(viewer.get("api/0/groups"))["groups"][0]["prompt"].split()[2:]
    searches = [{"q": f"{word} "} for word in words] + [
        {"q": " ".join(words[at : at + 3])} for at in range(len(words) - 3)
    ]
    print("search:", viewer.seconds("api/0/groups", searches))
    lists = [viewer.get("api/0/groups", offset=at * (count // GROUP // 50)) for at in range(50)]
    groups = [{"id": json.loads(found)["groups"][0]["id"]} for found in lists]
    print("open a group of another step:", viewer.seconds("api/0/group", groups))
    settings = json.dumps({"gamma": 0.5, "baseline": "turn", "scale": "batch_std", "shaping.enable": False})
    print(
        "what if, with the batch's scale:",
        viewer.seconds("api/0/whatif", [one | {"settings": settings} for one in groups]),
    )
    print(f"after all that: {viewer.megabytes:.0f} MB resident")


if __name__ == "__main__":
    main()
