"""FSDP2 on the CPU: verl's own engine, registered for the device "cpu"."""

from __future__ import annotations

from typing import Any

from verl.workers.engine import EngineRegistry

from verl_ext.fused_head import FusedHeadInRoot


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
class CPUFSDP2Engine(FusedHeadInRoot):
    """verl's FSDP2 language-model engine over gloo.

    A forward-only engine (the KL reference) would wrap its parameters in `CPUOffloadPolicy(pin_memory=True)`, which
    needs an accelerator to pin for. The parameters are on the CPU already, so the policy is left out.
    """

    def _build_fsdp_module(self, module: Any) -> Any:
        forward_only = self.engine_config.forward_only
        self.engine_config.forward_only = False
        try:
            return super()._build_fsdp_module(module)
        finally:
            self.engine_config.forward_only = forward_only
