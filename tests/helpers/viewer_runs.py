"""Run folders for the viewer's tests: a few trajectories as the trainer records them, and hostile ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from verl_ext.records import VERSION


def call(code: str, outcome: str = "ok", output: str = "7\n") -> dict[str, Any]:
    """A turn that calls the tool; everything of a turn that a test does not care about is filled in."""
    text = f"Let me see.<tool_call>{json.dumps({'name': 'python', 'arguments': {'code': code}})}</tool_call>"
    made = {"name": "python", "arguments": {"code": code}, "error": None, "detail": ""}
    came = {"outcome": outcome, "output": output, "seconds": 0.25}
    if outcome == "malformed":
        made["error"] = "invalid_json"
    return {"text": text, "calls": [made], "outcomes": [came], "broken": made["error"]}


def say(text: str, broken: str | None = None) -> dict[str, Any]:
    """A turn without a call."""
    return {"text": text, "calls": [], "outcomes": [], "broken": broken}


def trajectory(
    group: str,
    *turns: dict[str, Any],
    acc: float = 0.0,
    finish: str = "answer",
    dropped: bool = False,
    advantages: list[float] | None = None,
    tokens: int = 10,
    **extra: Any,
) -> dict[str, Any]:
    """A record (verl_ext/records). Every turn has `tokens` tokens, with two that are not its own between.

    Args:
        advantages: one a turn; None: none was assigned.
    """
    placed = [turn | {"start": k * (tokens + 2), "end": k * (tokens + 2) + tokens} for k, turn in enumerate(turns)]
    for turn, advantage in zip(placed, advantages or [], strict=False):
        turn["advantage"] = advantage
    return {
        "version": VERSION,
        "group": group,
        "dropped": dropped,
        "turns": placed,
        "finish": finish,
        "acc": acc,
        "pred": "7",
        "prompt": [{"role": "user", "content": f"What is the sum of {group}?"}],
        **extra,
    }


def write(run_dir: Path, steps: dict[int, Iterable[dict[str, Any]]]) -> Path:
    """A run folder with these trajectories by step."""
    for step, rows in steps.items():
        (run_dir / "trajectories").mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run_dir / "trajectories" / f"{step}.jsonl").write_text(lines)
    return run_dir


#: Two groups: one solved by two of three, one that nobody solved and that has all the faults that filters look for.
MIXED = [
    trajectory("apples", call("3 + 4"), say(r"It is \boxed{7}."), acc=1.0, advantages=[0.4, 0.9]),
    trajectory("apples", call("print(3 + 4)"), say(r"So \boxed{7}."), acc=1.0, advantages=[0.4, 0.9]),
    trajectory("apples", call("3 * 4", output="12\n"), say(r"It is \boxed{12}."), advantages=[-1.2, -1.4]),
]
FAULTY = [
    trajectory("pears", say("Seven.", "first_turn_no_call"), advantages=[-0.5]),
    trajectory("pears", call("while True: pass", "timeout", ""), say("No idea.", "no_answer"), advantages=[0.5, -0.5]),
    trajectory("pears", call("{", "malformed", "not JSON"), finish="turn_limit", advantages=[-0.25]),
    trajectory("pears", call("1", "infra", ""), finish="infra", dropped=True),
]
TOKENS = {"token_ids": [5, 7], "log_prob_gaps": [0.0, -0.25]}
EQUAL = [trajectory("plums", say(r"\boxed{1}") | TOKENS, advantages=[0.0]) for _ in range(2)]
#: Of a run that diverged: numbers that JSON has not, by name as our trainer writes them, and one as Python's json does.
_LOST = {"log_prob": "nan", "log_prob_gap": "inf", "advantage": float("nan"), "return": "-inf", "divisor": "inf"}
_LOST |= {"token_ids": [5, 7], "log_prob_gaps": ["nan", -0.25], "rewards": {"outcome": "nan", "format": -0.5}}
DIVERGED = [
    trajectory("figs", call("1") | _LOST, say("x"), acc="nan", outcome="inf", shaped="nan"),  # type: ignore[arg-type]
    trajectory("figs", call("1", output="1\n"), say("x"), partners=[{"session": 0, "similarity": "nan"}]),
]
DIVERGED[0]["turns"][0]["outcomes"][0]["seconds"] = "inf"

_CLICK = "window.hacked = true"
#: What a model or a tool may write to take the page over. Each sets `window.hacked` where it is believed.
HOSTILE = [
    f"<script>{_CLICK}</script>",
    f"<img src=x onerror='{_CLICK}'>",
    f"<svg onload='{_CLICK}'><animate onbegin='{_CLICK}' attributeName=x dur=1s></svg>",
    f"<a href='javascript:{_CLICK}'>click</a>",
    f"[click](javascript:{_CLICK})",
    f"</script><script>{_CLICK}</script>",
    f"--></style><script>{_CLICK}</script>",
    f"<iframe srcdoc='<script>parent.{_CLICK}</script>'></iframe>",
    f"<details open ontoggle='{_CLICK}'>",
    f"<math><mtext><mglyph><style><img src=x onerror='{_CLICK}'></style></mglyph></mtext></math>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'><base href='https://evil.example/'>",
    "<style>* { display: none !important }</style><link rel=stylesheet href=//evil.example/x.css>",
    f"$\\href{{javascript:{_CLICK}}}{{x}}$ $\\url{{javascript:{_CLICK}}}$ \\(\\htmlStyle{{position:fixed}}{{x}}\\)",
    "$" + r"\def\a{\a\a}\a" + "$ $" + "{" * 5000 + "$",
    f"{{{{constructor.constructor('{_CLICK}')()}}}} ${{{_CLICK}}} <%= {_CLICK} %>",
    "\u202eevil reversed\u202c \u2066isolate\u2069 zero\u200bwidth \U000e0041tag",
    "\x1b[31mred\x1b[0m \x1b]8;;https://evil.example\x07link\x1b]8;;\x07 \x07bell \x00nul",
    "lone \ud800 surrogate",
    '"}]}}\n__proto__ constructor \'"`<!--',
    "A" * 10_000_000,
]


def hostile() -> list[dict[str, Any]]:
    """One trajectory for each text, with it in every place that a model or a tool can write to."""
    rows = []
    for text in HOSTILE:
        short = text[:200_000]
        turn = call(short, output=text) | {"text": short}
        turn["calls"][0] |= {"name": short[:60], "detail": short[:400]}
        row = trajectory("hostile", turn, say(short, "no_answer"), pred=short[:60], fault="")
        rows.append(
            row | {"prompt": [{"role": "system", "content": short[:900]}, {"role": "user", "content": short[:900]}]}
        )
    return rows
