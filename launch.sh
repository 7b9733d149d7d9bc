#!/usr/bin/env bash
#SBATCH --job-name=tessera --ntasks-per-node=1 --exclusive --mem=0
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
# The front door: ./launch.sh COMMAND [arguments], or sbatch launch.sh train ... It makes .venv on first use, renews it
# when pyproject.toml or constraints.txt change, and hands over to Python, which decides everything else. What sbatch
# is given on its line goes before the #SBATCH lines.
set -euo pipefail

readonly COMMANDS="train test setup estimate prepare evaluate generate status report dashboard export import bench doctor"
readonly EXTRAS="gpu te deepspeed s3 dashboard tensorboard" # of pyproject.toml, beside dev, which is always there
# launch-state of an environment that is complete: the folder that it was made for, then its extras and the checksum of
# the requirements; of one that is being made: "installing", then that folder.
readonly STATE=launch-state

usage() {
  cat <<'EOT'
Tessera pretrains Qwen3-Next-style models: Gated DeltaNet + gated attention, sparse experts, multi-token prediction.

usage: ./launch.sh COMMAND [options] [key=value ...]

  train      train a recipe; "tiny", the default, is the real model in miniature: minutes on two CPU cores
  test       run the tests
  setup      make or extend the environment, on any machine: setup gpu,te,deepspeed,s3,dashboard,tensorboard
  estimate   say what a recipe would cost: parameters, operations, memory, GPU-hours
  prepare    turn raw text into tokenized shards
  evaluate   measure a run's held-out loss
  generate   write text with a run's checkpoint
  status     say how a run is: step, speed, last checkpoint, health
  report     write one HTML page of a run, or of several beside each other
  dashboard  publish the same panels as a view of a W&B project
  export     write a run's weights as a Hugging Face checkpoint
  import     make a run of a Hugging Face checkpoint
  bench      time a model on this machine, and transformers beside it
  doctor     say what this machine is, and check its kernels

examples:
  ./launch.sh train                                    the default recipe, on what this machine has
  ./launch.sh train run.name=mine run.steps=200 seed=1 settings are key=value; the same line again resumes runs/mine
  ./launch.sh train -cn tiny_512e run.steps=5          another recipe, a file of recipes/
  NPROC=4 ./launch.sh train parallel.expert=4          processes on this machine (else every GPU, or 2 on CPU)
  sbatch -N 2 launch.sh train                          the same over the nodes of a Slurm job; without -N as many as
                                                       the recipe's parallel.world needs
  ./launch.sh evaluate run=mine
  ./launch.sh test tests/data -x                       arguments of test go to pytest
  ./launch.sh train --help                             the settings of a command

The first use makes .venv with a Python from 3.12 to 3.14 (PYTHON=/path/to/python3.12 names one) and installs pinned
packages there: about 5 GB, about 2 minutes. On x86 Linux more than half of it is CUDA, also without a GPU: torch as
the package index has it does not load without those libraries. Ctrl-C is safe; the next use starts the set-up again.
EOT
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

# Prints what keeps the Python "$1" from making an environment; nothing when it will do. It is really run, because a
# pyenv shim named python3.12 exists, and fails, where no such version is selected.
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

# The checkout. Slurm runs a copy of this file from its spool folder, and knows where it was submitted, and from where.
find_root() {
  local file root
  root=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
  if [[ ! -f $root/pyproject.toml && -n ${SLURM_JOB_ID:-} ]]; then
    # Of an array's last job the number is that of the array, of which every job is shown.
    file=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | grep -oP '^ *Command=\K.*?/launch\.sh(?= |$)' | sort -u) || true
    for root in "$(dirname "$(readlink -f "${file:-/}")")" "${SLURM_SUBMIT_DIR:-}"; do
      [[ ! -f $root/launch.sh || ! -f $root/pyproject.toml ]] || break
    done
  fi
  [[ -f $root/pyproject.toml ]] || fail 2 "the checkout of this file is not found: submit it from there"
  printf '%s\n' "$root"
}

has_gpu() { [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]]; }

requirements() { cat pyproject.toml constraints.txt | cksum; }

# Prints the line "$2" of the state of the environment "$1", or nothing.
state() { sed -n "$2p" "$1/$STATE" 2>/dev/null || true; }

# Prints the extras that the environment "$1" holds, by commas.
extras() { [[ $(state "$1" 1) == installing ]] || state "$1" 2 | cut -d' ' -f1; }

# Whether the environment "$1" holds today's requirements, with every extra of "$2" (by commas). One made with more, on
# a GPU node or by setup, also serves the nodes that share it.
is_current() {
  local extra
  [[ -x $1/bin/python && $(state "$1" 1) != installing && $(state "$1" 2) == *" $(requirements)" ]] || return 1
  for extra in ${2//,/ }; do
    [[ ,$(extras "$1"), == *",$extra,"* ]] || return 1
  done
}

# Prints the folder of the environment: .venv; where that is another path's (a container's mount, a moved folder) it
# serves as it is, by `python -m`, while it has what is needed, "$1", and is never written to: else there is one beside.
choose() {
  local made_for beside
  made_for=$(state .venv 1)
  [[ $made_for != installing ]] || made_for=$(state .venv 2)
  beside=$BASE/.venv-$(printf '%s' "$PWD" | cksum | cut -d' ' -f1)
  if [[ -z $made_for && -w . || $made_for == "$PWD" && ($(state .venv 1) == installing || -x .venv/bin/python) ]]; then
    printf '%s\n' "$PWD/.venv"
  elif [[ ! -f $beside/$STATE ]] && is_current .venv "$1" && .venv/bin/python -c '' 2>/dev/null; then
    printf '%s\n' "$PWD/.venv"
  else
    printf '%s\n' "$beside"
  fi
}

# Takes the lock of the set-up; says so where it has to wait, or where the file system knows no locks.
lock() {
  exec 9>"$BASE/.launch.lock"
  local code=0
  if command -v flock >/dev/null; then flock -n -E 75 9 2>/dev/null || code=$?; else code=127; fi
  if ((code == 75)); then
    say "another set-up is running in this folder; waiting for it"
    flock 9
  elif ((code)); then
    say "files cannot be locked here (flock is missing, or the file system is without it): start no two set-ups at once"
    return 1
  fi
}

# Installs the extras "$2" into the environment "$1". A checkout that cannot be written is run where it lies, and only
# what it requires is installed.
install() {
  local pip editable=--editable where=.
  pip=("$1/bin/python" -m pip install --constraint constraints.txt)
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
  # pip first: the one that a Python brings may be too old to show how far an installation has come.
  if [[ -n $(extras "$1") ]]; then pip+=(--retries 1); else "${pip[@]}" --quiet --upgrade pip || return 1; fi
  if [[ ! -w . ]]; then
    mkdir -p "$1/requirements" && cp pyproject.toml LICENSE "$1/requirements"
    editable="" where=$1/requirements
  fi
  pip+=(--log "$1/install.log")
  "${pip[@]}" ${editable:+"$editable"} "${where}[${2/,te/}]" || return 1
  # Transformer Engine is compiled against the torch that is there by now.
  [[ ,$2, != *,te,* ]] || "${pip[@]}" --no-build-isolation ${editable:+"$editable"} "${where}[$2]"
}

# Makes the environment, or extends it by the extras "$1", under the lock; prints nothing, the caller chooses again. An
# environment that is complete stays so whatever happens here: nothing is removed from it, and its state is written
# once it has what it says. Runs in a subshell, so that the lock is let go with it and never reaches the command.
set_up() (
  set -e # which the caller, who asks for the exit code, has taken back
  trap 'say "interrupted; the next use starts the set-up again"; exit 130' INT
  locked=1
  lock || locked=0
  venv=$(choose "$1")
  ! is_current "$venv" "$1" || exit 0
  if [[ $(state "$venv" 1) == installing ]] && ((locked)); then
    say "removing a ${venv##*/} that is unfinished"
    find "$venv/" -mindepth 1 -delete # not the folder itself: it may be a link to a larger disk
  fi
  if [[ ! -f $venv/$STATE ]]; then
    python=$(find_python)
    say "making ${venv##*/} with $python"
    mkdir -p "$venv"
    printf 'installing\n%s\n' "$PWD" >"$venv/$STATE"
    "$python" -m venv "$venv" || fail 1 "$python could not make $venv: the lines above say why"
  fi
  wanted=$(printf 'dev,%s,%s' "$1" "$(extras "$venv")" | tr , '\n' | awk 'NF && !seen[$0]++' | paste -sd,)
  say "installing packages (extras: $wanted): about 5 GB, about 2 minutes; log in $venv/install.log"
  if ! install "$venv" "$wanted"; then
    if [[ -z $(extras "$venv") ]] || ! "$venv/bin/python" -c 'import torch, megatron.core, datasets, hydra'; then
      fail 1 "pip failed for the reason above; no network? disk full (free: $(df -Ph "$venv" | awk 'END {print $4}'))?" \
        "The same command tries again."
    fi
    say "WARNING: pip failed for the reason above (no network?): going on with the environment as it is. Where there is" \
      "a network, make it whole: ./launch.sh setup $wanted"
    exit 3
  fi
  printf '%s\n%s %s\n' "$PWD" "$wanted" "$(requirements)" >"$venv/$STATE.new"
  mv "$venv/$STATE.new" "$venv/$STATE"
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
readonly CALLER=$PWD
ROOT=$(find_root)
cd "$ROOT"
BASE=$PWD # of what is written beside the runs
[[ -w . ]] || BASE=$CALLER
needed=dev
if has_gpu; then needed=dev,gpu; fi
if [[ $command == setup ]]; then
  [[ $# -le 1 ]] || fail 2 "setup takes extras in one word, by commas: ./launch.sh setup gpu,te"
  asked=${1:-}
  for extra in ${asked//,/ }; do
    [[ " $EXTRAS dev " == *" $extra "* ]] || fail 2 "setup knows no extra '$extra'. The extras are: $EXTRAS"
  done
  needed=$needed${asked:+,$asked}
fi
if ! is_current "$(choose "$needed")" "$needed"; then
  set +e
  set_up "$needed"
  code=$?
  set -e
  [[ $code == 0 || ($code == 3 && $command != setup) ]] || exit "$((code == 3 ? 1 : code))"
fi
VENV=$(choose "$needed")
if [[ $command == setup ]]; then
  say "$VENV holds: $(extras "$VENV")"
  exit
fi
# Some packages start helpers of theirs (ninja, ...) by name; those of another path's environment name that path.
[[ $(state "$VENV" 1) != "$PWD" ]] || export PATH="$VENV/bin:$PATH"
if [[ $command == test ]]; then
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tests start several processes on few cores
  # Without arguments two files at once, each file's tests in one process, which share what they start: tests wait as
  # often as they compute.
  (($#)) || set -- -n 2 --dist loadfile --no-loadscope-reorder
  exec "$VENV/bin/python" -m pytest "$@"
fi
# Paths on the line are the caller's; a checkout that cannot be written leaves runs and caches to the caller's folder.
[[ $CALLER == "$PWD" ]] || set -- --from "$CALLER" "$@"
exec "$VENV/bin/python" -m train "$command" "$@"
