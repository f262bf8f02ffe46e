"""A machine with GPUs, as far as `nvidia-smi` shows it: a program of that name that prints what the real one would."""

from __future__ import annotations

from pathlib import Path

HEADER = "| NVIDIA-SMI 580.65.06     Driver Version: 580.65.06     CUDA Version: {cuda}     |"
#: Of drivers since 610.
UMD_HEADER = "| NVIDIA-SMI 610.43.02              KMD Version: 610.43.02     CUDA UMD Version: {cuda}     |"


def nvidia_smi(
    folder: Path,
    count: int,
    memory: int | str = 81559,
    used: int = 1,
    name: str = "NVIDIA H100",
    cuda: str = "13.0",
    header: str = HEADER,
) -> Path:
    """Write it; sizes in MiB. Put `folder` before all others on PATH."""
    rows = "\n".join(f"GPU-{i:04d}, {name}, {memory}, {used}, 580.65.06" for i in range(count))
    listed = "\n".join(f"GPU {i}: {name} (UUID: GPU-{i:04d})" for i in range(count))
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --query-gpu=uuid,name,memory.total,memory.used,driver_version) cat <<END\n{rows}\nEND\n;;\n'
        f"-L) cat <<END\n{listed}\nEND\n;;\n"
        f"'') cat <<END\n{header.format(cuda=cuda)}\nEND\n;;\n*) exit 2 ;; esac\n"
    )
    program.chmod(0o755)
    return program
