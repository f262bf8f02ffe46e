"""verl's TaskRunner with our trainers known to it and a watch on everything it starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from omegaconf import DictConfig
from transfer_queue import interface
from verl.trainer.main_ppo import TaskRunnerV1

from recipe.gtpo.run.errors import one_line
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.watchdog import ActorWatch

# verl hands its TaskRunner out as a Ray actor class, which cannot be subclassed; this is the class inside it.
# tests/gtpo/test_plugin.py breaks when it moves.
_TaskRunner = TaskRunnerV1.__ray_metadata__.modified_class


@ray.remote
class GTPOTaskRunner(_TaskRunner):  # type: ignore[valid-type, misc]
    """Runs the trainer in its own process; ends it when a part of the run dies."""

    _watch: ActorWatch | None = None  # from the moment that all parts have started

    def init_agent_loop_manager(self) -> None:
        super().init_agent_loop_manager()
        self._watch = ActorWatch(self._parts(), RunRecord(self.config.run_dir), self.config.watchdog.poll_seconds)
        self._watch.start()

    def run(self, config: DictConfig) -> None:
        # Ray sends this class by value: in the process that runs it, nothing has imported the module that it stands in.
        import recipe.gtpo.trainer  # noqa: F401  registers gtpo_sync, gtpo_colocate_async, gtpo_separate_async

        try:
            super().run(config)
        except BaseException as e:
            # The error may be a consequence: an actor found dead is the better answer.
            cause = self._watch.find_dead(timeout=3.0) if self._watch is not None else None
            RunRecord(config.run_dir).write_cause(cause or one_line(e))
            raise
        finally:
            if self._watch is not None:
                self._watch.stop()

    def _parts(self) -> Iterator[tuple[str, Any]]:
        trainer = self.trainer
        for worker in trainer.actor_rollout_wg.workers:
            yield "training worker", worker
        for replica in trainer.llm_server_manager.get_replicas():
            for server in replica.servers:
                yield "rollout server", server
        for worker in self.agent_loop_manager.agent_loop_workers:
            yield "agent loop worker", worker
        for worker in trainer.get_reward_handles() or ():
            yield "reward worker", worker
        yield "balancer of the rollout servers", trainer.llm_server_manager.global_load_balancer
        yield "controller of TransferQueue", ray.get_actor("TransferQueueController", namespace="transfer_queue")
        # TransferQueue has no public name for its storage units. Without one that it lost, it waits for ever.
        # tests/gtpo/test_plugin.py breaks when it moves.
        for units in (interface._TQ_STORAGE or {}).values():
            for unit in units.values():
                yield "storage of TransferQueue", unit
