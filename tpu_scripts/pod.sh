#!/usr/bin/env bash
# Runs training on a Google Cloud TPU slice, from requesting the nodes to deleting them.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=common.sh
source "$HERE/common.sh"
# shellcheck source=queued_resource.sh
source "$HERE/queued_resource.sh"
# shellcheck source=workers.sh
source "$HERE/workers.sh"
# shellcheck source=watch.sh
source "$HERE/watch.sh"

USAGE="usage: tpu_scripts/pod.sh COMMAND [--settings FILE] [--dry-run] [--keep]

  watch    create, setup and launch, again after each preemption, until the run has finished
  create   request the nodes, and wait for them
  setup    copy the committed code to all workers, install it, and count the devices
  launch   start the run on all workers
  status   show nodes, workers, and the newest metrics
  stop     make the run save and exit; the nodes stay
  delete   delete the nodes; the bucket stays

  --settings FILE   settings file (default: tpu_scripts/settings.sh)
  --dry-run         print the commands without running them
  --keep            with watch, keep the nodes at the end

See docs/pods.md."

main() {
  local verb=${1:-} file="$HERE/settings.sh"
  case $verb in
    create | setup | launch | status | watch | stop | delete) shift ;;
    "" | -h | --help | help) answer "$USAGE" && return ;;
    *) fail "unknown command '$verb': see pod.sh --help" ;;
  esac
  DRY_RUN="" KEEP="" COMMIT="" REMINDER="" # Ignore the environment.
  while (($#)); do
    case $1 in
      --settings) file=${2:?"pod.sh: --settings needs a file"} && shift ;;
      --settings=*) file=${1#*=} ;;
      --dry-run) DRY_RUN=yes ;;
      --keep) KEEP=yes ;;
      *) fail "unknown option '$1': see pod.sh --help" ;;
    esac
    shift
  done
  POLL_SECONDS=${POLL_SECONDS:-60}      # between checks of Google Cloud
  LOG_SECONDS=${LOG_SECONDS:-60}        # between copies of a worker's log
  SETTLE_SECONDS=${SETTLE_SECONDS:-150} # from a worker's exit to a verdict; JAX ends the others after 100
  SILENT_SECONDS=${SILENT_SECONDS:-900} # without a log until a worker counts as lost
  STOP_SECONDS=${STOP_SECONDS:-900}     # for a run to save
  load_settings "$file"
  if [[ -z $DRY_RUN ]]; then
    command -v gcloud >/dev/null ||
      fail "gcloud is not installed: https://cloud.google.com/sdk/docs/install"
  fi
  SCRATCH=$(mktemp -d)
  trap at_exit EXIT
  exec 3>&1
  cd "$HERE/.."
  "do_$verb"
}

# After an error, reminds the user of nodes that still cost money.
at_exit() {
  local code=$?
  rm -rf "$SCRATCH"
  if ((code)) && [[ -n $REMINDER ]]; then answer "pod.sh: $REMINDER" >&2; fi
}

remind_of_nodes() {
  REMINDER="existing nodes of $NAME cost money until you run tpu_scripts/pod.sh delete"
}

do_create() {
  remind_of_nodes
  create_pod
  say "next: tpu_scripts/pod.sh setup (the nodes cost money from now on)"
}

do_setup() {
  remind_of_nodes
  install_on_workers
  count_devices
}

do_launch() {
  local launch
  remind_of_nodes
  choose_commit
  launch=$(new_launch)
  put_text "$COMMIT" "$launch/commit"
  start_run "$launch"
  say "the run continues on its own; tpu_scripts/pod.sh watch restarts it after preemptions"
}

do_status() {
  show_status
}

do_watch() {
  watch_run
}

do_stop() {
  local state
  remind_of_nodes
  mark_as_stopped
  state=$(queued_resource_state ACTIVE)
  if [[ $state == ACTIVE ]]; then stop_run; else say "$NAME: no run is active ($state)"; fi
}

do_delete() {
  mark_as_stopped
  delete_pod
}

main "$@"
