"""Protects the memory of a CPU run: what was freed goes back to the system when verl asks for it, and not before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from verl.plugin.platform.platform_manager import get_platform
from verl.utils.device import get_torch_device

import verl_ext.cpu.memory as memory

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[3]
MIB = 1 << 20
#: 200 blocks of 1 MiB, freed, then given back; what the process held at each of the three moments, in MiB.
PROGRAM = """
import psutil
from verl_ext.cpu.memory import empty_cache
process = psutil.Process()
blocks = [b"x" * (1 << 20) for _ in range(200)]
sizes = [process.memory_info().rss]
del blocks
sizes.append(process.memory_info().rss)
empty_cache()
sizes.append(process.memory_info().rss)
print(*(size >> 20 for size in sizes))
"""


@pytest.mark.skipif(memory._malloc_trim() is None, reason="needs glibc")
def test_freed_memory_goes_back_to_the_system():
    """Under the settings of the allocator that a run on the CPU has, which keep all that is freed."""
    settings = re.findall(r"MALLOC_\w+=\d+", (ROOT / "examples" / "stack.sh").read_text())
    assert len(settings) == 3
    environment = os.environ | dict(setting.split("=") for setting in settings) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    full, freed, trimmed = map(int, done.stdout.split())
    assert freed > full - 20
    assert trimmed < full - 180


def test_another_c_library_has_nothing_to_give_back(monkeypatch):
    memory._malloc_trim.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    try:
        assert memory._malloc_trim() is None
        memory.empty_cache()
    finally:
        memory._malloc_trim.cache_clear()


def test_verl_s_own_calls_arrive(monkeypatch):
    """By the device's name, as in `update_weights`, and by the platform's."""
    asked = []
    monkeypatch.setattr(memory, "_malloc_trim", lambda: asked.append)
    get_torch_device().empty_cache()
    get_platform().empty_cache()
    assert asked == [0, 0]
