"""A run folder as the viewer sees it: its index, its config, its curves. All of them may still be growing."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from verl_ext.records.schema import Record
from verl_ext.viewer import records
from verl_ext.viewer.index import Index

logger = logging.getLogger(__name__)


class Run:
    """One run folder. `whatif` is the module of `whatif.load`, or None."""

    def __init__(self, path: Path, whatif: Any | None, index_folder: Path | None = None) -> None:
        self.path, self.whatif = path.resolve(), whatif
        self.name = self.path.name
        self.index = Index(self.path, index_folder)
        self._tokenizer: Any | None = None
        self._config: dict[str, Any] | None = None
        self._rows: tuple[Any, list[dict[str, Any]]] | None = None

    @property
    def config(self) -> dict[str, Any] | None:
        """Full key -> value, as the run was started; None where the run left no config.json, or has not yet."""
        path = self.path / "config.json"
        if self._config is None and path.exists():
            self._config = records.finite(json.loads(path.read_text()))
        return self._config

    @property
    def settings(self) -> dict[str, Any] | None:
        return None if self.whatif is None else self.whatif.settings_of(self.config)

    @property
    def metrics_seen(self) -> str | None:
        """Another after every write of metrics.jsonl; None where there is none."""
        try:
            status = (self.path / "metrics.jsonl").stat()
        except FileNotFoundError:
            return None
        return f"{status.st_size} {status.st_mtime_ns}"

    def metrics(self) -> list[dict[str, Any]]:
        """{"step": n, "metrics": {...}} by step, the latest for each, without the numbers that are not finite.

        A line that is no JSON is passed over.
        """
        path, by_step = self.path / "metrics.jsonl", {}
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    try:
                        found = json.loads(line)
                        known = {name: x for name, x in records.finite(found["metrics"]).items() if x is not None}
                        by_step[int(found["step"])] = found | {"metrics": known}
                    except (ValueError, KeyError, TypeError):
                        continue
        return [by_step[step] for step in sorted(by_step)]

    # -- the record ----------------------------------------------------------------------------------------------------

    def record(self, trajectory: int) -> Record:
        """The whole record of a trajectory, by its number in the index. Raises KeyError when it is not there."""
        with self.index.connect() as db:
            where = db.execute(
                "SELECT name, start, length, trajectories.step, trajectories.split "
                "FROM trajectories JOIN files ON files.id = file WHERE trajectories.id = ?",
                (trajectory,),
            ).fetchone()
        if where is None:
            raise KeyError(trajectory)
        line = self.index.line(where["name"], where["start"], where["length"])
        return records.parse(line, where["step"], where["split"])

    def rows(self, split: str, step: int) -> list[dict[str, Any]]:
        """What the index keeps of every trajectory of a step, in order; the latest step asked for is kept."""
        with self.index.connect() as db:
            found = db.execute(
                "SELECT trajectories.id, grp, kept, groups.label "
                "FROM trajectories JOIN numbers USING (id) JOIN groups ON groups.id = grp "
                "WHERE trajectories.split = ? AND trajectories.step = ? ORDER BY file, position",
                (split, step),
            ).fetchall()
        key = (split, step, len(found), found[-1]["id"] if found else 0)
        if self._rows is None or self._rows[0] != key:
            self._rows = (key, _rows(found))
        return self._rows[1]

    def unread(self, split: str, steps: Sequence[int]) -> tuple[int, str]:
        """How many lines of these steps are no record, one without an end included, and which is the first and why."""
        marks = ", ".join("?" * len(steps))
        with self.index.connect() as db:
            found = db.execute(
                "SELECT name, skipped, why, torn FROM files "
                f"WHERE split = ? AND step IN ({marks}) AND (skipped > 0 OR torn) ORDER BY step",
                (split, *steps),
            ).fetchall()
        first = found[0] if found else None
        why = "" if first is None else f"{first['name']}, {first['why'] or 'its last line has no end'}"
        return sum(one["skipped"] + bool(one["torn"]) for one in found), why

    def recompute(self, split: str, step: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """The answer of `whatif.recompute`, for all trajectories of a step."""
        assert self.whatif is not None
        return self.whatif.recompute(self.rows(split, step), settings, self.config, lambda: self.codes(split, step))

    def codes(self, split: str, step: int) -> list[str]:
        """What every trajectory of a step ran, all turns in order."""
        found = (self.record(row["id"]) for row in self.rows(split, step))
        return ["\n".join(code for code in records.executed(record) if code) for record in found]

    def tokens(self, numbers: Sequence[int]) -> list[str]:
        """Tokens as text, where the policy's tokenizer lies where the run had it; else their numbers."""
        path = Path(str((self.config or {}).get("actor_rollout_ref.model.path"))) / "tokenizer.json"
        if self._tokenizer is None and path.is_file():
            self._tokenizer = Tokenizer.from_file(str(path))
        if self._tokenizer is None:
            return [f"{number} " for number in numbers]
        return [self._tokenizer.decode([number], skip_special_tokens=False) for number in numbers]

    # -- where the gradient goes ---------------------------------------------------------------------------------------

    def update(self) -> int:
        """Read what is new in the run folder; how many lines that was."""
        changed = self.index.update()
        with self.index.connect() as db:
            missing = db.execute(
                "SELECT DISTINCT split, step FROM trajectories WHERE split = 'train' "
                "EXCEPT SELECT split, step FROM gradient"
            ).fetchall()
        for split, step in missing:
            weights = self._weights(split, step)
            with self.index.connect() as db:
                db.executemany(
                    "INSERT OR REPLACE INTO gradient VALUES (?, ?, ?, ?, ?, ?)",
                    [(split, step, *key, weight) for key, weight in weights.items()],
                )
        return changed

    def _parts(self, split: str, step: int) -> list[dict[str, Any]]:
        """The advantages of a step by reward part; none where the method cannot say."""
        if self.whatif is None:
            return []
        try:
            return self.recompute(split, step, self.settings or {})
        except (ValueError, RuntimeError) as error:  # another estimator; programs that cannot be compared here
            logger.warning(f"{self.path}, step {step}: advantages are not split by reward part: {error}")
            return []

    def _weights(self, split: str, step: int) -> dict[tuple[int, str, str], float]:
        """|advantage| x tokens of the update by turn, kind of group and reward part.

        A turn's weight is split as its advantage is.
        """
        rows = self.rows(split, step)
        parts = self._parts(split, step)
        outcomes: dict[int, list[bool]] = {}
        for row in rows:
            if not row["dropped"]:
                outcomes.setdefault(row["grp"], []).append(row["acc"] == 1)
        weights: dict[tuple[int, str, str], float] = {(0, "mixed", "none"): 0.0}  # says that the step was looked at
        for i, row in enumerate(rows):
            solved = outcomes.get(row["grp"], [])
            kind = "all solved" if solved and all(solved) else "unsolved" if not any(solved) else "mixed"
            for k, turn in enumerate(row["turns"]):
                if not turn["advantage"] or row["dropped"]:
                    continue
                trained = records.trained_tokens(turn)
                split_by = parts[i]["turns"][k]["advantage_parts"] if parts and k < len(parts[i]["turns"]) else {}
                total = sum(abs(value) for value in split_by.values())
                shares = {name: abs(v) / total for name, v in split_by.items() if v} if total else {"not split": 1.0}
                for part, share in shares.items():
                    key = (k, kind, part)
                    weights[key] = weights.get(key, 0.0) + share * abs(turn["advantage"]) * trained
        return weights


def _rows(found: Sequence[Any]) -> list[dict[str, Any]]:
    """The index's rows of a step. `similar` names the siblings that shaping compared by their position in this list."""
    rows = [json.loads(one["kept"]) | {"id": one["id"], "grp": one["grp"], "group": one["label"]} for one in found]
    places = {(row["grp"], row["session"]): at for at, row in enumerate(rows)}
    for at, row in enumerate(rows):
        partners = {places.get((row["grp"], int(session))): value for session, value in row.pop("partners").items()}
        partners.pop(None, None)  # a sibling that was not recorded
        row |= {"position": at, "similar": partners or None}
    return rows


def parse_steps(text: str) -> set[int]:
    """`1,5,10-12`, as an argument of a command. Raises argparse.ArgumentTypeError."""
    steps: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"{part!r} is no step; write 1,5,10-12")
        steps |= set(range(int(first), int(last or first) + 1))
    return steps
