# Sourced by the example scripts: which stack this machine has. Sets STACK and ARGS (the config groups hardware, rollout).
#
# ROLLOUT   vllm | sglang, with a GPU (default: vllm)
# HARDWARE  cpu | single_gpu | single_node | multi_node (default: what nvidia-smi shows); hardware= in the arguments wins

for argument in "$@"; do
  case $argument in hardware=*) HARDWARE=${argument#hardware=} ;; esac
done
if [[ -z ${HARDWARE:-} ]]; then
  gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
  if ((gpus == 0)); then HARDWARE=cpu; elif ((gpus < 8)); then HARDWARE=single_gpu; else HARDWARE=single_node; fi
fi

if [[ $HARDWARE == cpu ]]; then
  STACK=cpu
  ARGS=(hardware=cpu rollout=transformers)
  # glibc gives large freed tensors back to the system at once and faults them in again at the next step.
  export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
else
  STACK=${ROLLOUT:-vllm}
  ARGS=(hardware="$HARDWARE" rollout="$STACK")
fi
