"""A run folder as the viewer sees it: its index, its config, its curves. All of them may still be growing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from verl_ext.viewer import records
from verl_ext.viewer.index import Index


class Run:
    """One run folder. `whatif` is the module of `whatif.load`, or None."""

    def __init__(self, path: Path, whatif: Any | None, index_folder: Path | None = None) -> None:
        self.path, self.whatif = path.resolve(), whatif
        self.name = self.path.name
        self.index = Index(self.path, index_folder)
        self._rows: tuple[Any, list[dict[str, Any]]] | None = None

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """Full key -> value, as the run was started; None where the run left no config.json."""
        path = self.path / "config.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def settings(self) -> dict[str, Any] | None:
        return None if self.whatif is None else self.whatif.settings_of(self.config)

    def metrics(self) -> list[dict[str, Any]]:
        """{"step": n, "metrics": {...}} by step, the latest for each; a line that is no JSON is passed over."""
        path, by_step = self.path / "metrics.jsonl", {}
        if path.exists():
            with path.open("rb") as lines:
                for line in lines:
                    try:
                        found = json.loads(line)
                        by_step[int(found["step"])] = found
                    except (ValueError, KeyError, TypeError):
                        continue
        return [by_step[step] for step in sorted(by_step)]

    # -- the record ----------------------------------------------------------------------------------------------------

    def record(self, trajectory: int) -> dict[str, Any]:
        """The whole line of a trajectory, by its number in the index. Raises KeyError when it is not there."""
        with self.index.connect() as db:
            where = db.execute(
                "SELECT name, start, length FROM trajectories JOIN files ON files.id = file WHERE trajectories.id = ?",
                (trajectory,),
            ).fetchone()
        if where is None:
            raise KeyError(trajectory)
        with (self.index.trajectories / where["name"]).open("rb") as file:
            file.seek(where["start"])
            return json.loads(file.read(where["length"]))

    def step_records(self, split: str, step: int) -> Iterator[dict[str, Any]]:
        """All lines of a step, in order."""
        for row in self.rows(split, step):
            yield self.record(row["id"])

    def rows(self, split: str, step: int) -> list[dict[str, Any]]:
        """What the index keeps of every trajectory of a step, in order; the latest step asked for is kept."""
        with self.index.connect() as db:
            found = db.execute(
                "SELECT trajectories.id, grp, kept, groups.label FROM trajectories JOIN groups ON groups.id = grp "
                "WHERE trajectories.split = ? AND trajectories.step = ? ORDER BY file, position",
                (split, step),
            ).fetchall()
        key = (split, step, len(found), found[-1]["id"] if found else 0)
        if self._rows is None or self._rows[0] != key:
            self._rows = (key, [_row(one, position) for position, one in enumerate(found)])
        return self._rows[1]

    def recompute(self, split: str, step: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """The answer of `whatif.recompute`, for all trajectories of a step."""
        assert self.whatif is not None
        return self.whatif.recompute(self.rows(split, step), settings, self.config, lambda: self.codes(split, step))

    def codes(self, split: str, step: int) -> list[str]:
        return ["\n".join(c for c in records.executed(one) if c) for one in self.step_records(split, step)]

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

    def _weights(self, split: str, step: int) -> dict[tuple[int, str, str], float]:
        """|advantage| x tokens by turn, kind of group and reward part. A turn's weight is split as its advantage is."""
        rows = self.rows(split, step)
        parts = self.recompute(split, step, self.settings) if self.whatif and self.settings else []
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
                split_by = parts[i]["turns"][k]["advantage_parts"] if parts and k < len(parts[i]["turns"]) else {}
                total = sum(abs(value) for value in split_by.values())
                shares = {name: abs(v) / total for name, v in split_by.items() if v} if total else {"unknown": 1.0}
                for part, share in shares.items():
                    key = (k, kind, part)
                    weights[key] = weights.get(key, 0.0) + share * abs(turn["advantage"]) * turn["tokens"]
        return weights


def _row(found: Any, position: int) -> dict[str, Any]:
    kept = json.loads(found["kept"])
    similar = kept["similar"]
    return kept | {
        "id": found["id"],
        "position": position,  # by which `similar` names siblings
        "grp": found["grp"],
        "group": found["label"],
        "similar": similar and {int(k): v for k, v in similar.items()},
    }
