"""What the page asks, as functions from runs to JSON values. `app.py` serves them, `export.py` writes them down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from verl_ext.viewer import records
from verl_ext.viewer.runs import Run

#: Orders of the list of groups.
SORTS = {
    "step": "step, place",
    "latest": "step DESC, place",
    "spread": "spread DESC, step, place",
    "largest": "top DESC, step, place",
    "tokens": "tokens DESC, step, place",
    "least solved": "CAST(solved AS REAL) / size, step, place",
}
#: Characters of one text that a page gets at once; the rest is asked for.
TEXT_LIMIT = 20_000
PAGE = 100


def overview(runs: Sequence[Run]) -> dict[str, Any]:
    """What a page has to know before it asks anything else."""
    whatif = runs[0].whatif
    return {
        "runs": _runs(runs),
        "differences": config_differences(runs),
        "flags": list(records.FLAGS),
        "sorts": list(SORTS),
        "controls": whatif.controls() if whatif else [],
        "presets": whatif.presets() if whatif else {},
    }


def _runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every run: its steps, how much is read, how it is set."""
    found = []
    for number, (run, name) in enumerate(zip(runs, run_names(runs), strict=True)):
        with run.index.connect() as db:
            steps: dict[str, list[int]] = {}
            for split, step in db.execute("SELECT DISTINCT split, step FROM groups ORDER BY split, step"):
                steps.setdefault(split, []).append(step)
            lines, skipped = db.execute("SELECT TOTAL(lines), TOTAL(skipped) FROM files").fetchone()
            torn = [row[0] for row in db.execute("SELECT name FROM files WHERE torn ORDER BY id")]
            why = db.execute("SELECT name, why FROM files WHERE skipped > 0 ORDER BY id LIMIT 1").fetchone()
            revision = db.execute("SELECT value FROM meta WHERE key = 'revision'").fetchone()
        found.append(
            {
                "run": number,
                "name": name,
                "path": str(run.path),
                "steps": steps,
                "trajectories": int(lines - skipped),
                "skipped": int(skipped),
                "torn": torn,  # files whose last line has no end
                "why": why and f"{why['name']}, {why['why']}",
                "revision": revision and revision[0],
                "metrics": run.metrics_seen,  # a step's line comes after its trajectories
                "settings": run.settings,
                "has_config": run.config is not None,
            }
        )
    return found


def run_names(runs: Sequence[Run]) -> list[str]:
    """Their folders' names, with as many of the folders above as tell them apart: ("a/seed1", "b/seed1")."""
    parts = [run.path.parts for run in runs]
    most = max(map(len, parts), default=1)
    tails = [["/".join(one[-count:]) for one in parts] for count in range(1, most + 1)]
    return next((names for names in tails if len({*names}) == len({*parts})), tails[-1])


def config_differences(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The keys whose value differs between runs that left a config: [{"key", "values": one a run}]."""
    configs = [run.config for run in runs]
    known = [config for config in configs if config is not None]
    keys = sorted({key for config in known for key in config})
    differing = [key for key in keys if any(config.get(key) != known[0].get(key) for config in known[1:])]
    return [{"key": key, "values": [None if c is None else c.get(key) for c in configs]} for key in differing]


def groups(
    run: Run,
    *,
    split: str = "train",
    step: int | None = None,
    flags: Sequence[str] = (),
    text: str = "",
    prompt: str = "",
    sort: str = "step",
    offset: int = 0,
    limit: int = PAGE,
) -> dict[str, Any]:
    """{"total", "groups"}: those that have, of whatever trajectories, all `flags`, and one with all words of `text`.

    Raises ValueError, naming it, on a flag or an order that does not exist.
    """
    where: list[str] = ["split = ?"]
    values: list[Any] = [split]
    if step is not None:
        where, values = [*where, "step = ?"], [*values, step]
    for flag in flags:
        if flag not in records.FLAGS:
            raise ValueError(f"flag {flag!r} is not one of {', '.join(records.FLAGS)}")
        where, values = [*where, "flags & ?"], [*values, records.FLAGS[flag]]
    if prompt:
        where, values = [*where, "prompt_key = ?"], [*values, prompt]
    if text.strip():
        matches = "SELECT grp FROM texts JOIN trajectories ON trajectories.id = texts.rowid WHERE texts MATCH ?"
        where, values = [*where, f"id IN ({matches})"], [*values, match_expression(text)]
    if sort not in SORTS:
        raise ValueError(f"order {sort!r} is not one of {', '.join(SORTS)}")
    condition = " AND ".join(where)
    with run.index.connect() as db:
        total = db.execute(f"SELECT COUNT(*) FROM groups WHERE {condition}", values).fetchone()[0]
        found = db.execute(
            f"SELECT id, split, step, label, prompt_key, prompt, size, solved, flags, tokens, top, spread, turns "
            f"FROM groups WHERE {condition} ORDER BY {SORTS[sort]} LIMIT ? OFFSET ?",
            [*values, min(limit, PAGE), max(offset, 0)],
        ).fetchall()
    return {"total": total, "groups": [dict(row) | {"flags": _names(row["flags"])} for row in found]}


def all_groups(run: Run) -> list[dict[str, Any]]:
    """Every group as lists have it, in the order of the record."""
    with run.index.connect() as db:
        rows = db.execute("SELECT * FROM groups ORDER BY split, step, place").fetchall()
    return [dict(row) | {"flags": _names(row["flags"])} for row in rows]


def match_expression(text: str) -> str:
    """What the user typed as FTS5 reads it: all words and quoted phrases, the last one possibly a beginning."""
    parts = [quoted or word for quoted, word in re.findall(r'"([^"]+)"|(\S+)', text)]
    terms = ['"' + part.replace('"', "") + '"' for part in parts if re.search(r"\w", part)]
    if not terms:
        return '""'
    return " ".join(terms) + ("" if text.rstrip() != text or text.rstrip().endswith('"') else "*")


def _names(flags: int) -> list[str]:
    return [name for name, bit in records.FLAGS.items() if flags & bit]


def step_rows(run: Run, split: str, step: int) -> list[dict[str, Any]]:
    """The numbers of all trajectories of a step, with what each can be filtered by."""
    return [row | {"flags": _names(records.flags(row))} for row in run.rows(split, step)]


def group(run: Run, number: int, text: str = "") -> dict[str, Any]:
    """One group with the numbers of all its trajectories, and which of them have all words of `text` (`found`).

    Raises KeyError when it is not there.
    """
    with run.index.connect() as db:
        head = db.execute("SELECT * FROM groups WHERE id = ?", (number,)).fetchone()
    if head is None:
        raise KeyError(number)
    rows = [row for row in run.rows(head["split"], head["step"]) if row["grp"] == number]
    found = _matching(run, [row["id"] for row in rows], text) if text.strip() else set()
    return dict(head) | {
        "flags": _names(head["flags"]),
        "rows": [row | {"flags": _names(records.flags(row)), "found": row["id"] in found} for row in rows],
    }


def _matching(run: Run, trajectories: Sequence[int], text: str) -> set[int]:
    marks = ", ".join("?" * len(trajectories))
    with run.index.connect() as db:
        query = f"SELECT rowid FROM texts WHERE texts MATCH ? AND rowid IN ({marks})"
        return {row[0] for row in db.execute(query, [match_expression(text), *trajectories])}


def neighbours(run: Run, number: int) -> dict[str, int | None]:
    """The groups before and after, in the order of the record."""
    with run.index.connect() as db:
        key = db.execute("SELECT split, step, place FROM groups WHERE id = ?", (number,)).fetchone()
        if key is None:
            raise KeyError(number)
        of = "SELECT id FROM groups WHERE split = ? AND (step, place)"
        before = f"{of} < (?, ?) ORDER BY step DESC, place DESC LIMIT 1"
        after = f"{of} > (?, ?) ORDER BY step, place LIMIT 1"
        found = [db.execute(query, tuple(key)).fetchone() for query in (before, after)]
    return {"before": found[0] and found[0][0], "after": found[1] and found[1][0]}


def what_if(run: Run, number: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The group's trajectories with other settings: {trajectory: answer of `recompute`}.

    Raises KeyError for a group that is not there, ValueError for settings that cannot be.
    """
    with run.index.connect() as db:
        head = db.execute("SELECT split, step FROM groups WHERE id = ?", (number,)).fetchone()
    if head is None:
        raise KeyError(number)
    if run.whatif is None:
        raise ValueError("no installed package answers what-if questions (entry points 'verl_ext.viewer')")
    rows = run.rows(head["split"], head["step"])
    answers = run.recompute(head["split"], head["step"], settings)
    return {str(row["id"]): answer for row, answer in zip(rows, answers, strict=True) if row["grp"] == number}


def conversation(run: Run, trajectory: int, limit: int = TEXT_LIMIT) -> dict[str, Any]:
    """All texts of a trajectory; one longer than `limit` is {"text": its start, "length": of all}.

    A turn whose log-probability gaps are recorded by token has `tokens`: [[text, gap], ...].
    """
    record = run.record(trajectory)
    found = _cut(records.conversation(record), limit)
    for turn, gaps in zip(found["turns"], records.gaps(record), strict=True):
        ids, gap_of = zip(*gaps[:limit], strict=True) if gaps else ((), ())
        turn["tokens"] = list(zip(run.tokens(ids), gap_of, strict=True)) if gaps else None
    return found


def full_text(run: Run, trajectory: int, path: str) -> str:
    """One text of a conversation, whole, by its path in it: "turns/0/text". Raises KeyError when it is not there."""
    node: Any = records.conversation(run.record(trajectory))
    try:
        for part in path.split("/"):
            node = node[int(part)] if isinstance(node, list) else node[part]
    except (IndexError, ValueError, TypeError):
        raise KeyError(path) from None
    if not isinstance(node, str):
        raise KeyError(path)
    return node


def _cut(node: Any, limit: int) -> Any:
    if isinstance(node, dict):
        return {key: _cut(value, limit) for key, value in node.items()}
    if isinstance(node, list):
        return [_cut(value, limit) for value in node]
    return {"text": node[:limit], "length": len(node)} if isinstance(node, str) and len(node) > limit else node


def same_prompt(runs: Sequence[Run], key: str) -> list[dict[str, Any]]:
    """Every group that was given this prompt, over runs and steps."""
    found = []
    for number, (run, name) in enumerate(zip(runs, run_names(runs), strict=True)):
        with run.index.connect() as db:
            rows = db.execute(
                "SELECT id, split, step, label, size, solved, flags, top, spread, tokens FROM groups "
                "WHERE prompt_key = ? ORDER BY split, step, place",
                (key,),
            ).fetchall()
        found += [{"run": number, "name": name, **dict(row), "flags": _names(row["flags"])} for row in rows]
    return found


def gradient(run: Run) -> list[dict[str, Any]]:
    """|advantage| x tokens by step, turn index, kind of group and reward part."""
    with run.index.connect() as db:
        rows = db.execute(
            "SELECT step, turn, kind, part, weight FROM gradient WHERE weight > 0 ORDER BY step, turn, kind, part"
        ).fetchall()
    return [dict(row) for row in rows]


def curves(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any]:
    """{"names": all metrics of all runs, "curves": {name: [[[step, value], ...] of each run]}}."""
    lines = [run.metrics() for run in runs]
    known = sorted({name for run in lines for line in run for name in line["metrics"]})
    values = {
        name: [[[one["step"], one["metrics"][name]] for one in run if name in one["metrics"]] for run in lines]
        for name in names
    }
    return {"names": known, "curves": values}
