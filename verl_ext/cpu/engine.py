"""FSDP2 on the CPU: verl's own engine, registered for the device "cpu"."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from verl.models.transformers.dense_common import CausalLMOutputForPPO, forward_with_torch_backend
from verl.utils import tensordict_utils as tu
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.engine import EngineRegistry

from verl_ext.fused_head import FusedHeadInRoot

#: Rows that the fused head works on at a time: with 64, the logits of a vocabulary of 50 thousand are 12 MB and stay in
#: a processor's cache; verl's 512 are for a GPU.
HEAD_ROWS = 64


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cpu")
class CPUFSDP2Engine(FusedHeadInRoot):
    """verl's FSDP2 language-model engine over gloo.

    A forward-only engine (the KL reference) would wrap its parameters in `CPUOffloadPolicy(pin_memory=True)`, which
    needs an accelerator to pin for. The parameters are on the CPU already, so the policy is left out.

    With `model.use_fused_kernels=true` and padded rows, the head is applied to the tokens that count in the loss and to
    no other: on a CPU the head of a small model costs as much as its layers.
    """

    def _build_fsdp_module(self, module: Any) -> Any:
        forward_only = self.engine_config.forward_only
        self.engine_config.forward_only = False
        try:
            built = super()._build_fsdp_module(module)
        finally:
            self.engine_config.forward_only = forward_only
        self._chooses = (
            self.model_config.use_fused_kernels
            and not self.model_config.use_remove_padding
            # of models that see more than text, verl's fused forward is another one
            and type(module).forward is forward_with_torch_backend
        )
        if self._chooses:
            built.forward = MethodType(forward_where_wanted, built)
        return built

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        if self._chooses and tu.get_non_tensor_data(data=micro_batch, key="use_fused_kernels", default=False):
            inputs["wanted"] = wanted(micro_batch, inputs["input_ids"].shape[1])
        return inputs, output_args


def wanted(micro_batch: Any, length: int) -> torch.Tensor | None:
    """(rows, length): from which positions a token is predicted that counts in the loss; None: nobody says.

    A token is predicted from the position before it. In reinforcement learning `response_mask` says of each token of
    the response whether it counts, in supervised training `loss_mask` of each token of the row.
    """
    if "prompts" in micro_batch and "response_mask" in micro_batch:
        mask, starts = micro_batch["response_mask"], micro_batch["prompts"].offsets().diff()
    elif "prompts" not in micro_batch and "loss_mask" in micro_batch:
        mask = micro_batch["loss_mask"]
        starts = torch.zeros(len(mask), dtype=torch.long)
    else:
        return None
    chosen = torch.zeros(len(mask), length, dtype=torch.bool)
    for row, start, counts in zip(chosen, starts.tolist(), mask.unbind(), strict=True):
        places = start - 1 + counts.bool().nonzero()[:, 0]
        row[places[places >= 0]] = True
    return chosen


def forward_where_wanted(
    self: Any, input_ids: torch.Tensor, wanted: torch.Tensor | None = None, temperature: float = 1.0, **inputs: Any
) -> CausalLMOutputForPPO:
    """verl's fused forward with the head on the `wanted` positions only; elsewhere log-probs and entropy are 0."""
    if wanted is None:
        return forward_with_torch_backend(self, input_ids=input_ids, temperature=temperature, **inputs)
    inputs.pop("return_dict", None)
    hidden = self.model(input_ids=input_ids, **inputs)[0]
    labels = torch.roll(input_ids, shifts=-1, dims=-1)
    head = FusedLinearForPPO(chunk_size=HEAD_ROWS)
    log_probs, entropy = head(hidden[wanted], self.lm_head.weight, labels[wanted], temperature)
    spread = [torch.zeros(wanted.shape, dtype=some.dtype).masked_scatter(wanted, some) for some in (log_probs, entropy)]
    return CausalLMOutputForPPO(log_probs=spread[0], entropy=spread[1])
