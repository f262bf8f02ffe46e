"""The attack suite: programs that try to get out, stay behind, take the machine down or lie.

They are in attacks.txt, one after the other, as ``=== name | how it may end | wall limit in seconds`` (both optional)
and the program. Whichever way one ends, the world around it must be untouched: see ``lab.World.damage``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ENDINGS = {
    "ended": frozenset({"ok", "error"}),  # it ran to an end: whatever it tried was refused or had no effect
    "any": frozenset({"ok", "error", "syntax_error", "timeout", "memory", "output_limit", "crash"}),  # all but infra
}

# Prepended to every attack, after ``W``, what the attacker knows. `syscall` makes raw calls, past any check that libc
# or Python would do first; `machine_code` runs instructions.
PRELUDE = r"""
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def syscall(*a):
    return libc.syscall(*[ctypes.c_long(x) if isinstance(x, int) else x for x in a])
def machine_code(code):
    area = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    area.write(bytes.fromhex(code))
    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))()
def attempt(action):
    try:
        return action()
    except Exception as error:
        print("stopped by", type(error).__name__)
LAIR = W["lair"]
"""


@dataclass(frozen=True)
class Attack:
    name: str
    code: str
    outcomes: frozenset[str]
    timeout: float | None


def _load() -> Iterator[Attack]:
    text = (Path(__file__).parent / "attacks.txt").read_text()
    for section in text.split("\n=== ")[1:]:
        header, _, code = section.partition("\n")
        name, ending, timeout = [part.strip() for part in f"{header} | | ".split("|")][:3]
        outcomes = ENDINGS.get(ending or "ended") or frozenset(ending.split())
        yield Attack(name, code.partition("\n##### ")[0], outcomes, float(timeout) if timeout else None)


ATTACKS = list(_load())
