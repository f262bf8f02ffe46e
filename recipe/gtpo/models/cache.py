"""Folders that are made once and shared by all runs: whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

FACTS = "made_of.json"


def make_once(target: Path, facts: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
    """`target` as an absolute path, made now when it is not there.

    It appears by one rename: a killed run leaves no half of it behind. Two runs that want it: one makes it, the other
    waits.

    Args:
        facts: what it is made of, written beside it for whoever looks.
        make: fills a folder that exists and is empty.
    """
    target = target.resolve()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        if target.exists():
            return target
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            make(partial)
            (partial / FACTS).write_text(json.dumps(facts, indent=1))
            os.chmod(partial, 0o755)  # mkdtemp makes it private
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target
