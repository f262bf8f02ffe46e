"""verl's TaskRunner with our trainers known to it and a watch on everything it starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from omegaconf import DictConfig
from transfer_queue import interface
from verl.trainer.main_ppo import TaskRunnerV1
from verl.workers.rollout.replica import RolloutMode

from recipe.gtpo.run.errors import one_line
from recipe.gtpo.run.gpu import check_cluster
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.tools import start_executors
from recipe.gtpo.run.watchdog import ActorWatch
from verl_ext.tool_server import ToolClient
from verl_ext.tool_server.client import is_ray

# verl hands its TaskRunner out as a Ray actor class, which cannot be subclassed; this is the class inside it.
# tests/gtpo/test_plugin.py breaks when it moves.
_TaskRunner = TaskRunnerV1.__ray_metadata__.modified_class


@ray.remote
class GTPOTaskRunner(_TaskRunner):  # type: ignore[valid-type, misc]
    """Runs the trainer in its own process; ends it when a part of the run dies."""

    _watch: ActorWatch | None = None  # from the moment that all parts have started

    _executors: ToolClient | None = None  # where the tool server is an executor on every node

    def init_agent_loop_manager(self) -> None:
        if is_ray(self.config.tool_server.url):
            self._executors, line = start_executors(self.config.tool_server.url)
            print(f"gtpo: {line}", flush=True)
        super().init_agent_loop_manager()
        watchdog = self.config.watchdog
        self._watch = ActorWatch(
            self._parts(), RunRecord(self.config.run_dir), watchdog.poll_seconds, watchdog.engine_seconds
        )
        self._watch.start()

    def run(self, config: DictConfig) -> None:
        # Ray sends this class by value: in the process that runs it, nothing has imported the module that it stands in.
        import recipe.gtpo.trainer  # noqa: F401  registers gtpo_sync, gtpo_colocate_async, gtpo_separate_async

        try:
            check_cluster(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])
            super().run(config)
        except BaseException as e:
            # The error may be a consequence: an actor found dead is the better answer. verl has closed TransferQueue.
            cause = self._watch.find_dead(timeout=3.0, closed="TransferQueue") if self._watch is not None else None
            RunRecord(config.run_dir).write_cause(cause or one_line(e))
            raise
        finally:
            if self._watch is not None:
                self._watch.stop()

    def _parts(self) -> Iterator[tuple[str, Any]]:
        trainer = self.trainer
        for worker in trainer.actor_rollout_wg.workers:
            yield "training worker", worker
        # verl has no public name for all of them. tests/gtpo/test_plugin.py breaks when it moves.
        managers = trainer._rollout_server_managers()
        for replica in (replica for manager in managers for replica in manager.get_replicas()):
            for server in replica.servers:
                yield "rollout server", server
            if replica.rollout_mode is RolloutMode.STANDALONE:  # otherwise they are the training workers
                for worker in replica.workers:
                    yield "receiver of new weights", worker
        for worker in self.agent_loop_manager.agent_loop_workers:
            yield "agent loop worker", worker
        for worker in trainer.get_reward_handles() or ():
            yield "reward worker", worker
        for manager in managers:
            yield "balancer of the rollout servers", manager.global_load_balancer
        yield "controller of TransferQueue", ray.get_actor("TransferQueueController", namespace="transfer_queue")
        # TransferQueue has no public name for its storage units. Without one that it lost, it waits for ever.
        # tests/gtpo/test_plugin.py breaks when it moves.
        for units in (interface._TQ_STORAGE or {}).values():
            for unit in units.values():
                yield "storage of TransferQueue", unit
