"""What verl adds to vLLM's worker, on the CPU. vLLM imports this by name, in the process of its engine."""

from __future__ import annotations

from typing import Any

import vllm._custom_ops
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """Keeps the weights of linear layers where a weight sync finds them.

    vLLM's CPU layers hand their weight to oneDNN, packed, and drop the parameter: there would be nothing to load into.
    Without oneDNN they call torch's linear on the parameter.
    """

    def __new__(cls, **kwargs: Any) -> Any:
        vllm._custom_ops._supports_onednn = False  # private; tests/vllm_cpu breaks when it moves
        return super().__new__(cls, **kwargs)
