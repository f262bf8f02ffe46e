"""Protects how the package enters other people's processes: verl alone loads it, the CPU's glue only where it was asked
for, and every private name that we lean on has a test that breaks when it moves.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import ray
import transfer_queue.interface
import verl  # noqa: F401  loads the plugin
from ray import cloudpickle
from verl.trainer.main_ppo import TaskRunnerV1
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY
from verl.trainer.ppo.v1 import get_trainer_cls

import recipe.gtpo.trainer  # noqa: F401  registers ours
from recipe.gtpo import plugin
from recipe.gtpo.estimator import compute_gtpo_advantage
from recipe.gtpo.main import lost_part
from recipe.gtpo.task_runner import GTPOTaskRunner

pytestmark = pytest.mark.unit

LOOK = """
import json, sys
import verl
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.workers.rollout.replica import RolloutReplicaRegistry
estimator = get_adv_estimator_fn("gtpo")
print(json.dumps({
    "estimator": f"{estimator.__module__}.{estimator.__name__}",
    "glue": sorted(name for name in sys.modules if name.startswith(("verl_ext.cpu", "verl_ext.rollout"))),
    "rollout": RolloutReplicaRegistry.get("transformers").__module__,
    "platforms": PlatformRegistry.registered_names(),
    "driver_modules": sorted(name for name in sys.modules if name in ("recipe.gtpo.trainer", "recipe.gtpo.main")),
}))
"""


def look(tmp_path, platform: str | None) -> dict:
    """What a process that does nothing but `import verl` knows."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VERL_PLATFORM", "VERL_USE_EXTERNAL_PLUGINS")}
    if platform is not None:
        environment["VERL_PLATFORM"] = platform
    command = [sys.executable, "-W", "ignore", "-c", LOOK]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_verl_makes_the_estimator_known_and_nothing_of_the_cpu(tmp_path):
    """A GPU run: the CPU's glue is not imported, and neither is our trainer; our rollout is, where it is asked for."""
    seen = look(tmp_path, platform=None)
    assert seen["estimator"] == "recipe.gtpo.estimator.compute_gtpo_advantage"
    assert seen["glue"] == [] and seen["rollout"] == "verl_ext.rollout.server" and "cpu" not in seen["platforms"]
    assert seen["driver_modules"] == []


def test_each_package_registers_itself():
    """The recipe knows no CPU: verl_ext brings its platform by an entry point of its own."""
    found = {ep.name: ep.value for ep in entry_points(group="verl.plugins")}
    assert found["gtpo"] == "recipe.gtpo.plugin" and found["verl_ext"] == "verl_ext.plugin"


def test_the_plugin_of_verl_ext_alone_brings_the_cpu(tmp_path, monkeypatch):
    """For a recipe of somebody else's."""
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "verl_ext")
    environment = {**os.environ, "VERL_PLATFORM": "cpu"}
    ask = "import sys, verl; from verl.utils import device; print(device.get_device_name(), 'recipe' in sys.modules)"
    command = [sys.executable, "-W", "ignore", "-c", ask]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["cpu", "False"]


def test_import_verl_on_the_cpu_platform_brings_the_cpu_s_glue(tmp_path):
    seen = look(tmp_path, platform="cpu")
    assert seen["estimator"] == "recipe.gtpo.estimator.compute_gtpo_advantage"
    assert "verl_ext.cpu.platform" in seen["glue"] and seen["rollout"] == "verl_ext.rollout.server"
    assert "cpu" in seen["platforms"]


# -- assert_registered ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, "auto", " AUTO ", "gtpo", "other, gtpo"])
def test_a_policy_with_which_verl_loads_the_plugin_passes(monkeypatch, policy):
    monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    if policy is not None:
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    plugin.assert_registered()
    assert ADV_ESTIMATOR_REGISTRY["gtpo"] is compute_gtpo_advantage


@pytest.mark.parametrize("policy", ["none", "", "other"])
def test_a_policy_that_keeps_verl_from_loading_the_plugin_is_named(monkeypatch, policy):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    with pytest.raises(RuntimeError, match=f"VERL_USE_EXTERNAL_PLUGINS='{policy}' keeps verl from loading"):
        plugin.assert_registered()


def test_a_package_that_is_not_installed_is_told_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: ())
    with pytest.raises(RuntimeError, match=r"pip install --no-deps -e \."):
        plugin.assert_registered()


def test_another_estimator_of_our_name_is_refused(monkeypatch):
    monkeypatch.delenv("VERL_USE_EXTERNAL_PLUGINS", raising=False)
    monkeypatch.setitem(ADV_ESTIMATOR_REGISTRY, "gtpo", lambda **kwargs: None)
    with pytest.raises(RuntimeError, match="another package has registered an advantage estimator named 'gtpo'"):
        plugin.assert_registered()


# -- private names ----------------------------------------------------------------------------------------------------


def test_ray_keeps_the_class_inside_an_actor_where_the_task_runner_takes_it():
    inside = TaskRunnerV1.__ray_metadata__.modified_class
    assert inspect.isclass(inside)
    assert issubclass(GTPOTaskRunner.__ray_metadata__.modified_class, inside)
    # what our subclass extends, by name
    assert callable(inside.run) and callable(inside.init_agent_loop_manager)


RUN = """
import inspect
import sys
from pathlib import Path
import ray
import verl
from ray import cloudpickle
from verl.trainer.ppo.v1 import get_trainer_cls
runner = cloudpickle.loads(Path(sys.argv[1]).read_bytes())
ray.nodes = list  # no Ray runs here
inspect.unwrap(runner.run).__globals__["check_cluster"] = lambda config, nodes: None
runner.__bases__[0].run = lambda self, config: print(get_trainer_cls(config).__name__)
object.__new__(runner).run("gtpo_sync")
"""


def test_the_task_runner_knows_our_trainers_in_a_process_that_imported_nothing_of_ours(tmp_path):
    """Ray sends the class of an actor by value, so what its module imports is not imported there."""
    sent = tmp_path / "runner"
    sent.write_bytes(cloudpickle.dumps(GTPOTaskRunner.__ray_metadata__.modified_class))
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(sent)]
    environment = {**os.environ, "VERL_PLATFORM": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "GTPOTrainerSync"


def test_ray_keeps_its_node_where_the_logs_are_looked_for():
    assert "_global_node" in vars(ray._private.worker)  # None until Ray runs
    assert list(inspect.signature(ray._private.node.Node.get_logs_dir_path).parameters) == ["self"]


def test_ray_says_which_of_its_processes_are_dead(monkeypatch):
    def process(status):
        return SimpleNamespace(process=SimpleNamespace(poll=lambda: status, pid=7))

    names = ray._private.ray_constants
    assert (names.PROCESS_TYPE_GCS_SERVER, names.PROCESS_TYPE_RAYLET) == ("gcs_server", "raylet")
    node = object.__new__(ray._private.node.Node)
    monkeypatch.setattr(ray._private.worker, "_global_node", node)
    node.all_processes = {"log_monitor": [process(1)], "raylet": [process(None)]}
    assert lost_part(None) is None
    node.all_processes["raylet"] = [process(-9)]
    assert lost_part(None) == "Ray's raylet died: pid 7"
    monkeypatch.setattr(ray._private.worker, "_global_node", None)  # before Ray has started
    assert lost_part(None) is None


@pytest.mark.parametrize("mode", ["gtpo_sync", "gtpo_colocate_async", "gtpo_separate_async"])
def test_the_trainer_names_every_manager_of_rollout_servers(mode):
    """The watch looks after the servers of all of them."""
    trainer = object.__new__(get_trainer_cls(mode))
    trainer.llm_server_manager = "beside the trainer"
    assert trainer._rollout_server_managers() == ["beside the trainer"]
    if mode == "gtpo_separate_async":
        trainer.standalone_server_manager = "apart"
        assert trainer._rollout_server_managers() == ["beside the trainer", "apart"]


def test_transfer_queue_keeps_its_actors_where_the_watch_looks_for_them():
    source = inspect.getsource(transfer_queue.interface)
    assert isinstance(transfer_queue.interface._TQ_STORAGE, dict | None)  # None until it runs, then by backend
    assert "_TQ_STORAGE[backend_name] = backend_resources" in source
    assert 'name="TransferQueueController", namespace="transfer_queue"' in source
