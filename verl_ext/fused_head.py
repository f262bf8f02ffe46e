"""verl's FSDP2 engine with its fused head for every model: `actor_rollout_ref.model.external_lib=verl_ext.fused_head`.

With `model.use_fused_kernels=true` verl computes log-probs and entropy from the last hidden states in chunks, so that
the logits of a micro-batch (tokens x vocabulary) are never in memory, and no loop goes over tokens where flash-attn is
absent. verl 0.9.1 cannot do it with FSDP2 where embedding and head have matrices of their own (Qwen2.5-7B and larger):
it shards the head as a unit of its own, whose forward never runs, and reads a weight that is not gathered ("got mixed
torch.Tensor and DTensor"; verl-project/verl#7427). Here such a head stays in the root unit, which is gathered while
the model's own forward runs.

verl's workers import this module, by the key above, before they make an engine.
"""

from __future__ import annotations

from typing import Any

from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead


class FusedHeadInRoot(FSDPEngineWithLMHead):
    """verl's FSDP2 language-model engine; embedding and head belong to the root unit when the head is fused."""

    def _build_fsdp_module(self, module: Any) -> Any:
        # verl has no key for which modules become units. It asks the model's config whether the two share one matrix,
        # and makes no unit of either if so. tests/verl_ext/test_fused_head.py breaks when it asks something else.
        config, tied = module.config, module.config.tie_word_embeddings
        config.tie_word_embeddings = tied or bool(self.model_config.use_fused_kernels)
        try:
            return super()._build_fsdp_module(module)
        finally:
            config.tie_word_embeddings = tied


# The more exact key of verl's registry: its own engine stays where it is, under "cuda" without a vendor.
EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cuda", vendor="nvidia")(FusedHeadInRoot)
