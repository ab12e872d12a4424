#!/usr/bin/env bash
# Runs on each worker, one machine of a slice. pod.sh calls it over ssh.
#
#   worker.sh setup COMMIT [WEIGHTS]          installs the code, copies the weights
#   worker.sh check DEVICES                   counts the devices of all workers
#   worker.sh start COMMIT LAUNCH ARGUMENT... starts `grit-jax train` in its own session
#   worker.sh status                          prints whether the run is active
#   worker.sh stop                            makes the run save and exit
#
# LAUNCH is the bucket folder for the logs and exit codes of this launch. Local files are in
# ~/grit-jax: a folder per commit, `code` (a link to the current one), the weights, and `run`, the
# state of the newest launch.
set -euo pipefail

UV_VERSION=0.13.9 # uv installs Python if the machine's is too old.
BASE="$HOME/grit-jax"
CODE="$BASE/code"
RUN="$BASE/run"
HOST=$(hostname)
export PYTHONUNBUFFERED=1 # The log is copied during the run.
# Without a working TPU, fail instead of training on the CPU.
export JAX_PLATFORMS=tpu,cpu

say() {
  printf '%s: %s\n' "$HOST" "$*"
}

fail() {
  say "$*" >&2
  exit 1
}

setup() {
  local commit=$1 weights=${2:-}
  cd "$BASE/$commit"
  if [[ ! -f .venv/.installed ]]; then
    make_environment
    .venv/bin/pip install --quiet --constraint constraints.txt --editable ".[tpu]"
    touch .venv/.installed
  fi
  if [[ -n $weights ]]; then
    mkdir -p "$BASE/weights"
    # Remove files of other weights.
    gcloud storage rsync --recursive --delete-unmatched-destination-objects "$weights" \
      "$BASE/weights" || fail "cannot copy the weights $weights to the disk"
  fi
  ln -sfn "$commit" "$CODE"
  say "$commit is installed"
}

make_environment() {
  if command -v python3.12 >/dev/null && python3.12 -m venv .venv; then return; fi
  python3 -m pip install --quiet --user "uv==$UV_VERSION"
  python3 -m uv venv --quiet --seed --clear --python 3.12 .venv
}

check() {
  # Only one process can use a TPU, and JAX ends a run that another process tries to join.
  ! is_active || fail "a run is active and uses the TPU: run tpu_scripts/pod.sh stop"
  cd "$CODE"
  .venv/bin/python tpu_scripts/check_devices.py "$1"
}

start() {
  local commit=$1 launch=$2
  [[ $(readlink "$CODE") == "$commit" ]] ||
    fail "the installed code is $(readlink "$CODE"), not $commit: run tpu_scripts/pod.sh setup"
  if is_active; then
    [[ $(<"$RUN/launch") == "$launch" ]] || fail "a run is active: run tpu_scripts/pod.sh stop"
  else
    mkdir -p "$RUN"
    rm -f "$RUN/exit_code" "$RUN/pid"
    printf '%s\n' "$launch" >"$RUN/launch"
    date -u '+%Y-%m-%dT%H:%M:%SZ started' >"$RUN/log"
    copy_log || fail "cannot write to $launch: see docs/pods.md, 'The bucket'"
    setsid nohup bash "$0" run "${@:2}" >"$RUN/worker.log" 2>&1 </dev/null &
    until [[ -f $RUN/pid ]]; do
      kill -0 $! 2>/dev/null || fail "the session exited immediately: $(<"$RUN/worker.log")"
      sleep 0.1
    done
  fi
  say "started"
}

# The session: trains, copies the log, and writes the exit code.
run() {
  local launch=$1 training copier code
  shift
  cd "$CODE"
  .venv/bin/grit-jax train "$@" >>"$RUN/log" 2>&1 &
  training=$!
  trap 'kill -TERM "$training" 2>/dev/null || true' TERM
  printf '%s\n' "$$" >"$RUN/pid" # From now on, it can be stopped.
  keep_copying_log &
  copier=$!
  # A signal interrupts wait, but not the training.
  while kill -0 "$training" 2>/dev/null; do wait "$training" || true; done
  wait "$training" && code=0 || code=$?
  kill "$copier" && wait "$copier" || true
  printf '%s ended with exit code %s\n' "$(date -u '+%Y-%m-%dT%H:%M:%SZ')" "$code" >>"$RUN/log"
  printf '%s\n' "$code" >"$RUN/exit_code"
  for _ in 1 2 3 4 5; do
    if copy_log && gcloud storage cp --quiet "$RUN/exit_code" "$launch/$HOST.exit_code"; then break; fi
    sleep 5
  done
}

# Copies until SIGTERM, and completes a started copy.
keep_copying_log() {
  local pause=""
  trap 'kill $pause; exit' TERM
  while :; do
    sleep "$LOG_SECONDS" &
    pause=$!
    wait "$pause"
    copy_log || true
  done
}

copy_log() {
  gcloud storage cp --quiet "$RUN/log" "$(<"$RUN/launch")/$HOST.log"
}

is_active() {
  local pid
  [[ -f $RUN/pid ]] || return
  pid=$(<"$RUN/pid")
  # After a reboot, another process may have the same pid.
  kill -0 "$pid" 2>/dev/null && grep -qs worker.sh "/proc/$pid/cmdline"
}

status() {
  if is_active; then
    say "training with commit $(readlink "$CODE")"
  elif [[ -f $RUN/exit_code ]]; then
    say "ended with exit code $(<"$RUN/exit_code")"
  else
    say "no run"
  fi
}

stop() {
  local pid second
  if is_active; then
    pid=$(<"$RUN/pid")
    kill -TERM "$pid"
    for ((second = 0; second < STOP_SECONDS; second++)); do
      is_active || break
      sleep 1
    done
    if is_active; then
      say "not saved within $STOP_SECONDS seconds: killed"
      kill -KILL -- "-$pid"
    fi
  fi
  status
}

"$@"
