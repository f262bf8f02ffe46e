"""verl on a machine without an accelerator: platform, FSDP2 engine on gloo, workers, weight sync; vLLM's CPU build.

verl 0.9.1 knows NVIDIA, AMD and Ascend devices only. This package fills verl's own registries for the device "cpu" and
patches nothing. It is imported only where `VERL_PLATFORM=cpu` (see `verl_ext.plugin`); a GPU run never sees it.

- `platform`: the device, registered under "cpu"; logical GPUs stand for training processes in Ray's bundles.
- `engine`: FSDP2 over gloo, float32.
- `workers`: verl's training workers with a process group that verl's own helper cannot build for the CPU.
- `checkpoint`: new weights for such servers that have no training process beside them, over gloo.
- `vllm_rollout`, `vllm_worker`: verl's own vLLM server, where the CPU build of vLLM is installed.
"""
