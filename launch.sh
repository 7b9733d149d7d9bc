#!/usr/bin/env bash
# The front door: ./launch.sh COMMAND [arguments]. It makes .venv on first use, renews it when pyproject.toml or
# constraints.txt change, and hands over to Python, which decides everything else.
set -euo pipefail

readonly COMMANDS="train test estimate prepare evaluate generate export import bench doctor"
readonly STATE=.venv/launch-state # of a complete set-up: root, extras, checksum; of one under way: "installing"

usage() {
  cat <<'EOF'
Tessera pretrains Qwen3-Next-style models: Gated DeltaNet + gated attention, sparse experts, multi-token prediction.

usage: ./launch.sh COMMAND [options] [key=value ...]

  train      train a recipe; "tiny", the default, is the real model in miniature: minutes on two CPU cores
  test       run the tests
  estimate   say what a recipe would cost: parameters, operations, memory, GPU-hours
  prepare    turn raw text into tokenized shards
  evaluate   measure a run's held-out loss
  generate   write text with a run's checkpoint
  export     write a run's weights as a Hugging Face checkpoint
  import     make a run of a Hugging Face checkpoint
  bench      time a model on this machine, and transformers beside it
  doctor     say what this machine is, and check its kernels

examples:
  ./launch.sh train                                    the default recipe, on what this machine has
  ./launch.sh train run.name=mine run.steps=200 seed=1 settings are key=value; the same line again resumes runs/mine
  ./launch.sh train -cn tiny_512e run.steps=5          another recipe, a file of recipes/
  NPROC=4 ./launch.sh train parallel.expert=4          processes on this machine (else every GPU, or 2 on CPU)
  ./launch.sh evaluate run=mine
  ./launch.sh test tests/data -x                       arguments of test go to pytest
  ./launch.sh train --help                             the settings of a command

The first use makes .venv with a Python from 3.12 to 3.14 (PYTHON=/path/to/python3.12 names one) and installs pinned
packages there: about 5 GB, about 2 minutes. Ctrl-C is safe; the next use starts the set-up again.
EOF
}

say() { printf 'launch.sh: %s\n' "$*" >&2; }
fail() { say "${@:2}" && exit "$1"; }

# Prints the command that "$1" was probably meant to be, if any.
nearest() {
  case $1 in -* | *=*) echo train && return ;; esac
  # shellcheck disable=SC2086 # one argument for each command
  python3 -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' "$1" $COMMANDS \
    2>/dev/null || true
}

# Prints what keeps the Python "$1" from making .venv; nothing when it will do. It is really run, because a pyenv shim
# named python3.12 exists, and fails, where no such version is selected.
flaw() {
  "$1" -c '
import sys
version = "%d.%d.%d" % tuple(sys.version_info[:3])
if not (3, 12) <= tuple(sys.version_info[:2]) <= (3, 14):
    sys.exit(print("is Python " + version))
try:
    import ensurepip, venv
except ImportError:
    print("is Python " + version + " without ensurepip (Debian, Ubuntu: apt install python3-venv)")
' 2>/dev/null || echo "does not run"
}

candidates() {
  type -aP python3.12 python3 || true
  local root
  root=$(pyenv root 2>/dev/null) || root=${PYENV_ROOT:-${HOME:-}/.pyenv}
  printf '%s\n' "$root"/versions/3.12*/bin/python | sort -rV
  uv python find --system '>=3.12,<3.15' 2>/dev/null || true
}

find_python() {
  local python reason
  if [[ -n ${PYTHON:-} ]]; then
    reason=$(flaw "$PYTHON")
    [[ -z $reason ]] || fail 2 "PYTHON=$PYTHON $reason; .venv needs 3.12 to 3.14: name such a Python, or unset PYTHON"
    printf '%s\n' "$PYTHON" && return
  fi
  while read -r python; do
    [[ -n $(flaw "$python") ]] || { printf '%s\n' "$python" && return; }
  done < <(candidates)
  fail 2 "no Python from 3.12 to 3.14 with venv found; get one ('apt install python3.12-venv', 'pyenv install 3.12'," \
    "'uv python install 3.12' or 'conda create -n py312 python=3.12') or name it: PYTHON=/path/to/python3.12"
}

has_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; }

# The state that a complete set-up with the extras "$1" leaves behind.
state() { printf '%s\n%s %s\n' "$PWD" "$1" "$(cat pyproject.toml constraints.txt | cksum)"; }

# A folder set up on a GPU node also serves the nodes without a GPU that share it.
is_current() {
  [[ -x .venv/bin/python && -f $STATE ]] || return 1
  [[ $(<"$STATE") == "$(state dev,gpu)" ]] || { [[ $(<"$STATE") == "$(state dev)" ]] && ! has_gpu; }
}

# Runs in a subshell, so that the lock is let go with it and never reaches the command that follows.
set_up() (
  trap 'say "interrupted; the next use starts the set-up again"; exit 130' INT
  exec 9>.launch.lock
  if ! command -v flock >/dev/null; then
    say "flock is missing: do not start two set-ups at once"
  elif ! flock -n 9; then
    say "another set-up is running in this folder; waiting for it"
    flock 9
  fi
  is_current && exit
  # Unfinished, moved (its scripts hold the old path) or bereft of its Python: nothing in it can be relied on.
  if [[ -f $STATE && ($(head -n 1 "$STATE") != "$PWD" || ! -x .venv/bin/python) ]]; then
    say "removing a .venv that is unfinished or was moved"
    find .venv/ -mindepth 1 -delete # not .venv itself: it may be a link to a larger disk
  fi
  if [[ ! -f $STATE ]]; then
    python=$(find_python)
    say "making .venv with $python"
    mkdir -p .venv
    echo installing >"$STATE"
    "$python" -m venv .venv || fail 1 "$python could not make .venv: the lines above say why"
  fi
  extras=dev
  if has_gpu; then extras=dev,gpu; fi
  complete=$(state "$extras")
  echo installing >"$STATE"
  say "installing packages (extras: $extras): about 5 GB, about 2 minutes; log in .venv/install.log"
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
  # pip first: the one that a Python brings may be too old to show how far an installation has come.
  pip=(.venv/bin/python -m pip install --constraint constraints.txt)
  { "${pip[@]}" --quiet --upgrade pip && "${pip[@]}" --log .venv/install.log --editable ".[$extras]"; } ||
    fail 1 "pip failed for the reason above; no network? disk full (free: $(df -Ph . | awk 'END {print $4}'))?" \
      "The same command tries again."
  printf '%s\n' "$complete" >"$STATE"
  say "the set-up is complete"
)

case ${1:-} in "" | -h | --help) usage && exit ;; esac
command=$1
shift
if [[ " $COMMANDS " != *" $command "* ]]; then
  near=$(nearest "$command")
  fail 2 "unknown command '$command'${near:+, did you mean $near?} The commands are: $COMMANDS"
fi
case ${PYTHON:-} in /*) ;; */*) PYTHON=$PWD/$PYTHON ;; esac
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")"
is_current || set_up
export PATH="$PWD/.venv/bin:$PATH" # some packages start helpers of theirs (ninja, ...) by name
if [[ $command == test ]]; then
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tests start several processes on few cores
  exec .venv/bin/python -m pytest "$@"
fi
exec .venv/bin/python -m train "$command" "$@"
