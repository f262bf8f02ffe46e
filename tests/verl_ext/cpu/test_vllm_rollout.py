"""Protects verl's vLLM server on the CPU as far as it goes without vLLM: who is asked for it, and which hooks of verl's
are filled. What it does, with vLLM: tests/vllm_cpu.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import verl
from verl.workers.rollout.base import _ROLLOUT_REGISTRY
from verl.workers.rollout.replica import RolloutReplicaRegistry

from verl_ext.cpu import vllm_rollout

pytestmark = pytest.mark.unit

SERVER = Path(verl.__file__).parent / "workers/rollout/vllm_rollout/vllm_async_server.py"


class VerlsServer:
    """As far as our hooks go: verl's asks for batch-invariant kernels, and calls `_post_init` at its end."""

    def __init__(self):
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
        self._server_address = "192.0.2.1"
        self.told = ""
        self._post_init("0")

    def _post_init(self, cuda_visible_devices):
        self.told = cuda_visible_devices

    def _get_worker_extension_cls(self):
        return "verl's"


class VerlsReplica:
    def __init__(self, replica_rank, config=None):
        self.replica_rank, self.config = replica_rank, config
        self.server_class = None


@pytest.fixture
def replica(monkeypatch):
    """Our replica class on the two fakes: verl's module cannot be imported without vLLM."""
    package, module = "verl.workers.rollout.vllm_rollout", "verl.workers.rollout.vllm_rollout.vllm_async_server"
    fake = ModuleType(module)
    fake.vLLMHttpServer, fake.vLLMReplica = VerlsServer, VerlsReplica
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "unset")  # restored after the test
    return RolloutReplicaRegistry.get("vllm")


def test_verl_s_registry_hands_out_our_replica_and_its_own_adapter(replica):
    assert replica is not VerlsReplica and issubclass(replica, VerlsReplica)
    assert replica.__module__ == vllm_rollout.__name__
    assert _ROLLOUT_REGISTRY["vllm", "async"] == "verl.workers.rollout.vllm_rollout.ServerAdapter"


def test_the_replica_s_server_is_verl_s_with_two_hooks_filled(replica):
    made = replica(3, config="c")
    assert (made.replica_rank, made.config) == (3, "c")
    server = made.server_class.__ray_metadata__.modified_class
    assert issubclass(server, VerlsServer)
    assert {name for name in vars(server) if not name.startswith("__")} >= {"_post_init", "_get_worker_extension_cls"}
    started = server()
    assert started.told == "0"  # verl's own was called
    assert os.environ["VLLM_BATCH_INVARIANT"] == "0" and started._server_address == "127.0.0.1"
    assert started._get_worker_extension_cls() == "verl_ext.cpu.vllm_worker.CPUWorkerExtension"


@pytest.fixture(scope="module")
def classes():
    return {node.name: node for node in ast.parse(SERVER.read_text()).body if isinstance(node, ast.ClassDef)}


def method(one: ast.ClassDef, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """Also where only its source can be read. StopIteration when verl has moved it."""
    return next(node for node in one.body if getattr(node, "name", None) == name)


def test_verl_s_server_has_the_hooks_and_calls_them_when_we_think(classes):
    server = classes["vLLMHttpServer"]
    assert ast.unparse(method(server, "_post_init").args) == "self, cuda_visible_devices: str"
    init = ast.unparse(method(server, "__init__"))
    assert init.endswith("self._post_init(cuda_visible_devices)")
    assert "os.environ['VLLM_BATCH_INVARIANT'] = '1'" in init and "self._server_address = " in init
    assert "run_uvicorn(app, args, self._server_address)" in ast.unparse(method(server, "run_server"))
    assert "self._get_worker_extension_cls()" in ast.unparse(method(server, "launch_server"))
    extension = ast.unparse(method(server, "_get_worker_extension_cls"))
    assert "verl.workers.rollout.vllm_rollout.utils.vLLMColocateWorkerExtension" in extension


def test_verl_s_replica_starts_the_class_that_it_was_given(classes):
    replica = classes["vLLMReplica"]
    assert "self.server_class = ray.remote(vLLMHttpServer)" in ast.unparse(method(replica, "__init__"))
    assert "self.server_class.options(" in ast.unparse(method(replica, "launch_servers"))


# -- the package's name -----------------------------------------------------------------------------------------------


def test_verl_asks_for_a_package_named_vllm():
    source = (SERVER.parent / "__init__.py").read_text()
    assert "vllm_package_name = 'vllm'" in ast.unparse(ast.parse(source)) and "raise PackageNotFoundError" in source


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Packages by name and version, installed in a folder of their own, and none besides."""

    def install(**packages):
        for name, version in packages.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            metadata = (
                f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n\nName: of the text\n"
            )
            (folder / "METADATA").write_text(metadata)
            (folder / "RECORD").write_text("vllm/__init__.py,,\n")
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        importlib.invalidate_caches()

    return install


@pytest.mark.parametrize("version", ["0.27.1", "0.27.1+cpu"])
def test_the_build_for_the_cpu_goes_by_the_name_vllm_too(install, tmp_path, version):
    install(vllm_cpu=version)
    found = metadata.distribution("vllm")
    assert (found.metadata["Name"], found.version) == ("vllm", "0.27.1+cpu")
    assert found.metadata.get_payload() == "Name: of the text\n"
    assert [str(file.locate()) for file in found.files] == [str(tmp_path / "vllm/__init__.py")]
    assert metadata.version("vllm-cpu") == version
    assert [one.metadata["Name"] for one in metadata.distributions()] == ["vllm-cpu"]  # it is not there twice


def test_a_package_named_vllm_is_left_alone(install):
    install(vllm_cpu="0.27.1", vllm="0.24.0")
    assert metadata.version("vllm") == "0.24.0"


def test_without_either_there_is_none(install):
    install(vllm_ascend="0.24.0")
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")
