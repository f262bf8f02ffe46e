# shellcheck shell=bash
# Sourced. venv_of STACK: the folder of that stack's environment. A folder a stack, since their pins exclude each other.
venv_of() {
  local own=.venv
  [[ $1 == cpu ]] || own=.venv-$1
  echo "${VENV:-$own}"
}
