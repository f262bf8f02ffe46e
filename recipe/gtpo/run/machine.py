"""What this machine has: GPUs, driver, compiler, memory. Read, never judged: `gpu.py` beside this judges."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from verl_ext.tool_server.machine import CGROUP

MIB, GB = 2**20, 1e9
_SECONDS = 10  # a driver in trouble answers nvidia-smi late or never


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes
    used: int  # bytes, by whatever runs there now
    driver: str

    def __str__(self) -> str:
        return f"{self.name}, {self.memory / GB:.0f} GB"


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that a process started here would see; none where there is no driver."""
    rows = [
        [cell.strip() for cell in line.split(",")]
        for line in _nvidia_smi(
            "--query-gpu=uuid,name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"
        ).splitlines()
        if line.count(",") == 4
    ]
    found = [Gpu(name, _mib(total), _mib(used), driver) for _, name, total, used, driver in rows]
    visible = _visible()
    if visible is None:
        return tuple(found)
    matches = ([gpu for i, gpu in enumerate(found) if _is_named(one, i, rows[i][0])] for one in visible)
    return tuple(one[0] for one in matches if len(one) == 1)  # CUDA takes what several ids begin with for none


def _visible() -> list[str] | None:
    """The devices that CUDA_VISIBLE_DEVICES names; None where all can be seen."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else [one.strip() for one in visible.split(",") if one.strip()]


def _is_named(name: str, index: int, uuid: str) -> bool:
    """By its number, or by its id, of which CUDA takes a beginning too."""
    return name == str(index) or (name.startswith("GPU-") and uuid.startswith(name))


def slices() -> tuple[str, ...]:
    """The slices of a GPU (MIG devices) that this process is given in the place of whole ones, by their ids."""
    return tuple(one for one in _visible() or () if one.startswith("MIG-"))


@functools.cache
def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver serves; None without a driver, or where nvidia-smi does not say."""
    match = re.search(r"CUDA (?:UMD )?Version:\s*(\d+)\.(\d+)", _nvidia_smi())  # UMD: since driver 610
    return (int(match[1]), int(match[2])) if match else None


def _nvidia_smi(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def c_compiler() -> str | None:
    """The program that Triton would compile with: what CC names, else gcc or clang."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return next((found for name in names if (found := shutil.which(name))), None)


def python_header() -> Path | None:
    """Python.h, where a compiler started from here would find it."""
    folders = [sysconfig.get_path("include")]
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        folders += [folder for folder in os.environ.get(variable, "").split(os.pathsep) if folder]
    return next((file for folder in folders if (file := Path(folder, "Python.h")).is_file()), None)


def _mib(text: str) -> int:
    return int(float(text) * MIB) if re.fullmatch(r"[\d.]+", text) else 0  # "[N/A]" of a card that shares the host's


def host_memory() -> int:
    """Bytes of the machine's own memory; a container's limit counts."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):
        return total


def shared_memory() -> int | None:
    """Bytes of /dev/shm; None where there is none."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return None


#: Of x86 and Arm: without one of them, bfloat16 is converted to float32 and back at every product.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@functools.cache
def cpu_dtype() -> str:
    """What a policy computes with on this machine: bfloat16 where its processor has the instructions, else float32."""
    try:
        flags = re.findall(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = []
    return "bfloat16" if flags and all(_BF16_FLAGS & set(line.split()) for line in flags) else "float32"
