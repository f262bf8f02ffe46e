"""The index of a run folder: SQLite, filled line by line, so that 100,000 trajectories are found without reading them.

    Index(run_dir).update()      reads what was added since the last call; cheap when there is nothing

It keeps where each trajectory's line is, the numbers that grid, ledger and what-if need, and a full-text index of all
texts; texts themselves stay in the run's files. It lies in the user's cache folder, never in the run's, and can be
deleted at any time. Processes fill it one at a time, while others read.

A line is taken when its end is there: the writer may be in the middle of it, or was killed there (`files.torn`). A file
that was written anew (a resumed run does steps again) is read again from its start. A line that is no record is counted
(`files.skipped`) and said.

`verl_ext.records.Reader` reads whole files; here a file is read on from where the last look ended, by bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from verl_ext.records.files import step_files, step_of
from verl_ext.records.reader import FOLDERS
from verl_ext.records.schema import Record
from verl_ext.viewer import records

#: Of the code that says what is in an index: one that other code has filled is made anew.
VERSION = hashlib.sha256(Path(__file__).read_bytes() + Path(records.__file__).read_bytes()).hexdigest()
#: Seconds of reading between two commits: how far a page lags behind while a large run is indexed.
_COMMIT_SECONDS = 0.5

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE files (
    id INTEGER PRIMARY KEY, name TEXT UNIQUE, split TEXT, step INTEGER, read INTEGER, seen TEXT, last TEXT,
    lines INTEGER, skipped INTEGER, why TEXT, torn INTEGER);
CREATE TABLE groups (
    id INTEGER PRIMARY KEY, split TEXT, step INTEGER, label TEXT, place INTEGER, prompt_key TEXT, prompt TEXT,
    size INTEGER, solved INTEGER, flags INTEGER, tokens INTEGER, top REAL, spread REAL, turns INTEGER,
    UNIQUE (split, step, label));
CREATE INDEX groups_step ON groups (split, step, place);
CREATE INDEX groups_prompt ON groups (prompt_key);
CREATE TABLE trajectories (
    id INTEGER PRIMARY KEY AUTOINCREMENT, file INTEGER, grp INTEGER, split TEXT, step INTEGER, position INTEGER,
    start INTEGER, length INTEGER, flags INTEGER);
CREATE TABLE numbers (id INTEGER PRIMARY KEY, kept TEXT);  -- apart: search walks over all trajectories, not this
CREATE INDEX trajectories_group ON trajectories (grp, position);
CREATE INDEX trajectories_step ON trajectories (split, step, position);
CREATE INDEX trajectories_file ON trajectories (file);
CREATE TABLE gradient (
    split TEXT, step INTEGER, turn INTEGER, kind TEXT, part TEXT, weight REAL,
    PRIMARY KEY (split, step, turn, kind, part));
CREATE VIRTUAL TABLE texts USING fts5(content, content='', columnsize=0, tokenize="unicode61 tokenchars '_'");
"""


def default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "verl_ext" / "viewer"


class Index:
    """The index of one run folder. Reading is safe from any thread; `update` is for one at a time."""

    def __init__(self, run_dir: Path, folder: Path | None = None) -> None:
        self.run_dir = run_dir.resolve()
        folder = folder or default_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path = folder / f"{hashlib.sha256(str(self.run_dir).encode()).hexdigest()[:24]}.sqlite"
        if self._version() != VERSION:
            self.path.unlink(missing_ok=True)
            with self.connect() as db:
                db.execute("PRAGMA journal_mode=WAL")  # pages are served while it is filled
                db.executescript(_TABLES)
                db.execute("INSERT INTO meta VALUES ('version', ?), ('run_dir', ?)", (VERSION, str(self.run_dir)))

    @contextmanager
    def connect(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=60)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA synchronous=NORMAL")  # nothing is lost that the run folder has not
        try:
            with db:
                yield db
        finally:
            db.close()

    def _version(self) -> str | None:
        if not self.path.exists():
            return None
        try:
            with self.connect() as db:
                return str(db.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()[0])
        except (sqlite3.DatabaseError, TypeError):
            return None

    # -- filling it ----------------------------------------------------------------------------------------------------

    def update(self) -> int:
        """Read what is new; how many lines that was. Waits where another process is at it."""
        with self.path.with_suffix(".lock").open("w") as lock, self.connect() as db:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed
            known = {row["name"]: dict(row) for row in db.execute("SELECT * FROM files")}
            there = {name: split for split, folder in FOLDERS.items() for name in self._names(folder)}
            for name in known.keys() - there.keys():
                _forget(db, known[name]["id"])
            changed = 0
            for name in there:
                changed += self._update_file(db, name, there[name], known.get(name))
        return changed

    def _names(self, folder: str) -> list[str]:
        """The files of a folder that have a step for a name, as paths in the run folder, by step."""
        return [f"{folder}/{path.name}" for path in step_files(self.run_dir / folder).values()]

    def _update_file(self, db: sqlite3.Connection, name: str, split: str, known: dict[str, Any] | None) -> int:
        try:
            status = (self.run_dir / name).stat()
            seen = f"{status.st_ino} {status.st_size} {status.st_mtime_ns}"
            if known and known["seen"] == seen:
                return 0
            with self.open(name) as file:
                if known and not _continues(file, known):
                    _forget(db, known["id"])
                    known = None
            with self.open(name) as file:
                return self._read_lines(db, file, known or _new_file(db, name, split), seen)
        except FileNotFoundError:  # deleted or replaced in between: the next update sees what is there then
            return 0

    def open(self, name: str) -> IO[bytes]:
        """A file of the run folder, what is in it if it is compressed."""
        path = self.run_dir / name
        raw = path.open("rb")
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw)) if path.suffix == ".zst" else raw

    def line(self, name: str, start: int, length: int) -> bytes:
        with self.open(name) as file:
            _skip(file, start)
            return file.read(length)

    def _read_lines(self, db: sqlite3.Connection, file: IO[bytes], known: dict[str, Any], seen: str) -> int:
        _skip(file, known["read"])
        touched: set[int] = set()
        began, new = time.monotonic(), 0
        known["torn"] = 0
        for line in file:
            if not line.endswith(b"\n"):
                known["torn"] = 1
                break
            try:
                record = records.parse(line, known["step"], known["split"])
            except ValueError as error:
                known["skipped"] += 1
                known["why"] = known["why"] or f"line {known['lines'] + 1}: {str(error).splitlines()[0]}"
            else:
                touched.add(self._add(db, known, record, len(line)))
            known["read"] += len(line)
            known["lines"] += 1
            known["last"] = _digest(line)
            new += 1
            if time.monotonic() - began > _COMMIT_SECONDS:
                self._save(db, known, touched, "")
                touched, began = set(), time.monotonic()
        self._save(db, known, touched, seen)
        return new

    def _add(self, db: sqlite3.Connection, file: dict[str, Any], record: Record, length: int) -> int:
        kept = records.numbers(record)
        group = self._group(db, file, record)
        where = (file["id"], group, file["split"], file["step"], file["lines"], file["read"], length)
        row = db.execute(
            "INSERT INTO trajectories (file, grp, split, step, position, start, length, flags) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (*where, records.flags(kept)),
        )
        db.execute("INSERT INTO numbers VALUES (?, ?)", (row.lastrowid, json.dumps(kept, separators=(",", ":"))))
        text = _utf8("\n".join(records.searchable(record)))
        db.execute("INSERT INTO texts (rowid, content) VALUES (?, ?)", (row.lastrowid, text))
        return group

    def _group(self, db: sqlite3.Connection, file: dict[str, Any], record: Record) -> int:
        key = (file["split"], file["step"], _utf8(record.group))
        found = db.execute("SELECT id FROM groups WHERE split = ? AND step = ? AND label = ?", key).fetchone()
        if found:
            return int(found[0])
        number = group_number(*key)
        db.execute(
            "INSERT INTO groups (id, split, step, label, place, prompt_key, prompt) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (number, *key, file["lines"], records.prompt_key(record), _utf8(records.prompt_head(record))),
        )
        return number

    def _save(self, db: sqlite3.Connection, file: dict[str, Any], touched: set[int], seen: str) -> None:
        for group in touched:
            _summarise(db, group)
        if touched:  # where the gradient of the step goes is worked out anew
            db.execute("DELETE FROM gradient WHERE split = ? AND step = ?", (file["split"], file["step"]))
        db.execute(
            "UPDATE files SET read = ?, seen = ?, last = ?, lines = ?, skipped = ?, why = ?, torn = ? WHERE id = ?",
            (
                file["read"],
                seen,
                file["last"],
                file["lines"],
                file["skipped"],
                _utf8(file["why"]),
                file["torn"],
                file["id"],
            ),
        )
        db.execute("INSERT OR REPLACE INTO meta VALUES ('revision', ?)", (time.time_ns(),))
        db.commit()


def group_number(split: str, step: int, label: str) -> int:
    """The number of a group: the same in every index of the run, so that a link still shows it when one is made anew.

    48 bits, which a page's numbers hold. Groups are ordered by `place`, the line of the first trajectory.
    """
    return int.from_bytes(hashlib.sha256(json.dumps([split, step, label]).encode()).digest()[:6], "big")


def _utf8(text: str) -> str:
    """Half a character (a lone surrogate) is no UTF-8, and SQLite takes nothing else."""
    return text.encode("utf-8", "replace").decode()


def _new_file(db: sqlite3.Connection, name: str, split: str) -> dict[str, Any]:
    columns = "name, split, step, read, seen, last, lines, skipped, why"
    values = (name, split, step_of(Path(name)), 0, "", "", 0, 0, "")
    db.execute(f"INSERT INTO files ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
    return dict(db.execute("SELECT * FROM files WHERE name = ?", (name,)).fetchone())


def _skip(file: IO[bytes], count: int) -> None:
    """Go to a place in a file that was just opened; one that is compressed has to be read up to there."""
    if file.seekable():
        file.seek(count)
    while not file.seekable() and count > 0 and (some := file.read(min(count, 1 << 20))):
        count -= len(some)


def _digest(line: bytes) -> str:
    return f"{len(line)} {hashlib.sha256(line).hexdigest()[:16]}"


def _continues(file: IO[bytes], known: dict[str, Any]) -> bool:
    """Whether the file still holds what was read of it: its last read line stands where it stood."""
    if not known["last"]:
        return True
    length = int(known["last"].split()[0])
    _skip(file, known["read"] - length)
    return _digest(file.read(length)) == known["last"]


def _forget(db: sqlite3.Connection, file: int) -> None:
    """Drop what was read of a file. Its words stay in `texts` under numbers that nothing has any more."""
    groups = [row[0] for row in db.execute("SELECT DISTINCT grp FROM trajectories WHERE file = ?", (file,))]
    db.execute("DELETE FROM numbers WHERE id IN (SELECT id FROM trajectories WHERE file = ?)", (file,))
    db.execute("DELETE FROM trajectories WHERE file = ?", (file,))
    db.execute("DELETE FROM gradient WHERE (split, step) IN (SELECT split, step FROM files WHERE id = ?)", (file,))
    db.execute("DELETE FROM files WHERE id = ?", (file,))
    for group in groups:
        _summarise(db, group)
    db.execute("INSERT OR REPLACE INTO meta VALUES ('revision', ?)", (time.time_ns(),))


def _summarise(db: sqlite3.Connection, group: int) -> None:
    """What lists say of a group, from its trajectories; a group without any is gone."""
    rows = db.execute("SELECT flags, kept FROM trajectories JOIN numbers USING (id) WHERE grp = ?", (group,)).fetchall()
    if not rows:
        db.execute("DELETE FROM groups WHERE id = ?", (group,))
        return
    flags = 0
    kept = [json.loads(row["kept"]) for row in rows]
    for row in rows:
        flags |= row["flags"]
    turns = [turn for one in kept if not one["dropped"] for turn in one["turns"]]
    advantages = [turn["advantage"] for turn in turns if turn["advantage"] is not None]
    if advantages and not any(advantages):
        flags |= records.FLAGS["all equal"]
    db.execute(
        "UPDATE groups SET size = ?, solved = ?, flags = ?, tokens = ?, top = ?, spread = ?, turns = ? WHERE id = ?",
        (
            len(kept),
            sum(one["acc"] == 1 for one in kept),
            flags,
            sum(turn["tokens"] for one in kept for turn in one["turns"]),
            max(map(abs, advantages), default=0.0),
            max(advantages) - min(advantages) if advantages else 0.0,
            max((len(one["turns"]) for one in kept), default=0),
            group,
        ),
    )
