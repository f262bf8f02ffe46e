"""Protects what is read of the machine: GPUs as a process would see them, and a container's limits."""

from __future__ import annotations

import os

import pytest
from gpus import HEADER, UMD_HEADER, nvidia_smi

from recipe.gtpo.run import machine
from recipe.gtpo.run.machine import (
    MIB,
    Gpu,
    c_compiler,
    driver_cuda,
    gpus,
    host_memory,
    python_header,
    shared_memory,
    slices,
)

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    for read in (gpus, driver_cuda):
        read.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    yield
    for read in (gpus, driver_cuda):
        read.cache_clear()


def test_the_gpus_and_the_driver_are_those_that_nvidia_smi_shows(tmp_path):
    nvidia_smi(tmp_path, 2, memory=24564, used=300, name="NVIDIA GeForce RTX 4090", cuda="12.8")
    assert gpus() == (Gpu("NVIDIA GeForce RTX 4090", 24564 * MIB, 300 * MIB, "580.65.06"),) * 2
    assert driver_cuda() == (12, 8) and str(gpus()[0]) == "NVIDIA GeForce RTX 4090, 26 GB"


@pytest.mark.parametrize(
    ("header", "cuda", "found"),
    [(HEADER, "13.0", (13, 0)), (UMD_HEADER, "13.3", (13, 3)), (HEADER, "N/A", None), ("| CUDA |", "13.0", None)],
    ids=["until 610", "since 610", "no CUDA", "of another form"],
)
def test_the_driver_s_cuda_is_read_in_either_spelling(tmp_path, header, cuda, found):
    nvidia_smi(tmp_path, 1, cuda=cuda, header=header)
    assert driver_cuda() == found and len(gpus()) == 1


@pytest.mark.parametrize(
    ("visible", "count"), [("0", 1), ("3,1", 2), ("GPU-0002", 1), ("", 0), ("-1", 0), ("9", 0), (" 0 , 1 ", 2)]
)
def test_what_the_environment_hides_is_not_there(tmp_path, monkeypatch, visible, count):
    nvidia_smi(tmp_path, 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(gpus()) == count


@pytest.mark.parametrize(
    ("visible", "numbers"),
    [
        ("GPU-8932f937", [0]),
        ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", [0]),
        ("GPU-8a,GPU-893", [1, 0]),
        ("GPU-8", []),  # two begin so
        ("8932f937", []),
        ("GPU-9", []),
    ],
)
def test_a_gpu_goes_by_the_beginning_of_its_id(tmp_path, monkeypatch, visible, numbers):
    """As CUDA has it, where no other begins so."""
    ids = ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-8a56a4bc-0184-a3e1-8c69-a7d4f5a3d1f2"]
    rows = "\\n".join(f"{one}, H{i}, 81559, 1, 580.65.06" for i, one in enumerate(ids))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.name for gpu in gpus()] == [f"H{i}" for i in numbers]


@pytest.mark.parametrize(
    ("visible", "found"),
    [(None, ()), ("", ()), ("0,GPU-0001", ()), ("MIG-5f7a, MIG-GPU-0001/1/0", ("MIG-5f7a", "MIG-GPU-0001/1/0"))],
)
def test_slices_of_a_gpu_are_told_from_gpus(tmp_path, monkeypatch, visible, found):
    nvidia_smi(tmp_path, 2)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slices() == found and (not found or gpus() == ())


@pytest.mark.parametrize("program", [None, "exit 9", "echo 'NVIDIA-SMI has failed because it could not ...'; exit 0"])
def test_no_driver_or_a_broken_one_is_no_gpu(tmp_path, monkeypatch, program):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    if program is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert gpus() == () and driver_cuda() is None


def program(folder, name):
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)
    return str(folder / name)


def test_the_compiler_is_the_one_that_triton_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert c_compiler() is None
    program(tmp_path, "cc")  # which it does not look for
    assert c_compiler() is None
    clang = program(tmp_path, "clang")
    assert c_compiler() == clang
    gcc = program(tmp_path, "gcc")
    assert c_compiler() == gcc
    monkeypatch.setenv("CC", clang)
    assert c_compiler() == clang
    monkeypatch.setenv("CC", "no-such-compiler")  # and nothing else
    assert c_compiler() is None


def test_python_s_header_is_where_a_compiler_finds_it(tmp_path, monkeypatch):
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert python_header() is None
    (tmp_path / "own").mkdir()
    (tmp_path / "own/Python.h").touch()
    monkeypatch.setenv("CPATH", f"{tmp_path}/gone:{tmp_path}/own")
    assert python_header() == tmp_path / "own/Python.h"
    (tmp_path / "include").mkdir()
    (tmp_path / "include/Python.h").touch()
    assert python_header() == tmp_path / "include/Python.h"


def test_a_card_without_memory_of_its_own_has_none_to_count(tmp_path):
    nvidia_smi(tmp_path, 1, memory="[N/A]")
    assert gpus()[0].memory == 0


def test_a_container_s_limit_of_memory_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole = host_memory()
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory() == whole > 0
    (tmp_path / "memory.max").write_text("1000000\n")
    assert host_memory() == 1_000_000


def test_shared_memory_is_that_of_the_mount():
    stat = os.statvfs("/dev/shm")
    assert shared_memory() == stat.f_blocks * stat.f_frsize
