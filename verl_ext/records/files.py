"""One file a step, plain (`7.jsonl`) or compressed with zstd (`7.jsonl.zst`), written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import zstandard

PLAIN, COMPRESSED = ".jsonl", ".jsonl.zst"
SUFFIXES = (PLAIN, COMPRESSED)


def step_of(path: Path) -> int | None:
    """The step whose records a file holds; None for one that somebody else put there."""
    name, _, suffix = path.name.partition(".")
    return int(name) if name.isdecimal() and f".{suffix}" in SUFFIXES else None


def step_files(folder: Path) -> dict[int, Path]:
    """step -> file, ascending."""
    found = {step: path for path in sorted(folder.glob("*.jsonl*")) if (step := step_of(path)) is not None}
    return dict(sorted(found.items()))


def open_lines(path: Path) -> Iterator[str]:
    """The lines of a file, without their ends; of a file that was cut off, what is there."""
    with path.open("rb") as raw:
        stream = zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
        with io.TextIOWrapper(stream, encoding="utf-8", errors="replace", newline="\n") as text:  # type: ignore[arg-type]
            for line in text:
                if line.strip():
                    yield line.rstrip("\n")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write the whole file, under a name of its own until it is complete: no reader sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as raw:
        compressed = path.suffix == ".zst"
        with zstandard.ZstdCompressor().stream_writer(raw, closefd=False) if compressed else nullcontext(raw) as stream:
            for line in lines:
                stream.write(f"{line}\n".encode())
    temporary.replace(path)
