# shellcheck shell=bash disable=SC2034  # ARGS and EXTRAS are for whoever sources this
# Sourced by the example scripts: which stack this machine has. Sets STACK and ARGS (the config groups hardware, rollout),
# VENV (its environment, unless it is set), and EXTRAS (what setup_env.sh installs besides).
#
# ROLLOUT   with a GPU vllm | sglang | transformers (default: vllm), without one transformers | vllm_cpu (default:
#           transformers); rollout= in the arguments wins
# HARDWARE  cpu | single_gpu | single_node | multi_node, or a file of your own behind --config-dir
#           (default: what nvidia-smi shows); hardware= in the arguments wins

config_dir='' previous='' EXTRAS=()
for argument in "$@"; do
  case $argument in
    model=smollm2) EXTRAS=(smollm2) ;;
    hardware=*) HARDWARE=${argument#hardware=} ;;
    rollout=vllm | rollout=sglang | rollout=transformers | rollout=vllm_cpu) ROLLOUT=${argument#rollout=} ;;
    --config-dir=*) config_dir=${argument#--config-dir=} ;;
  esac
  [[ $previous == --config-dir ]] && config_dir=$argument
  previous=$argument
done
if [[ -z ${HARDWARE:-} ]]; then
  gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
  if ((gpus == 0)); then HARDWARE=cpu; elif ((gpus == 1)); then HARDWARE=single_gpu; else HARDWARE=single_node; fi
fi

# A hardware file of your own is for the CPU where it says so.
own=$config_dir/hardware/$HARDWARE.yaml
if [[ $HARDWARE == cpu ]] || { [[ -n $config_dir && -f $own ]] && grep -Eq '\bdevice: *"?cpu\b' "$own"; }; then
  if [[ ${ROLLOUT:-} == vllm_cpu ]]; then
    STACK=vllm_cpu
    ARGS=(hardware="$HARDWARE" rollout=vllm_cpu)
  else
    STACK=cpu
    ARGS=(hardware="$HARDWARE" rollout=transformers)
  fi
  # glibc gives large freed tensors back to the system at once and faults them in again at the next step.
  export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456
else
  STACK=${ROLLOUT:-vllm}
  if [[ $STACK == vllm_cpu ]]; then
    echo "stack: rollout=vllm_cpu does not run on hardware=$HARDWARE; use rollout=vllm, or hardware=cpu" >&2
    exit 1
  fi
  ARGS=(hardware="$HARDWARE" rollout="$STACK")
  [[ $STACK != transformers ]] || STACK=vllm  # every stack for GPUs has what it needs
fi
source examples/venv.sh
VENV=$(venv_of "$STACK")
export VENV
