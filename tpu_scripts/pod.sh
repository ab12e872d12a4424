#!/usr/bin/env bash
# A training run on a TPU pod slice of Google Cloud, from asking for nodes to deleting them.
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

USAGE="usage: tpu_scripts/pod.sh VERB [--settings FILE] [--dry-run] [--keep]

  watch    all of it: nodes, setup, launch; again after a preemption, until the run has finished
  create   ask for the nodes, and wait until they are there
  setup    bring the committed code to all workers, install it, and count the devices
  launch   start the run on all workers
  status   nodes, workers, and the newest metrics
  stop     have the run save and end; the nodes stay
  delete   delete the nodes; the bucket stays

  --settings FILE   another file than tpu_scripts/settings.sh
  --dry-run         print the commands, and run none of them
  --keep            watch leaves the nodes at the end, in place of deleting them

docs/pods.md says more."

main() {
  local verb=${1:-} file="$HERE/settings.sh"
  case $verb in
    create | setup | launch | status | watch | stop | delete) shift ;;
    "" | -h | --help | help) answer "$USAGE" && return ;;
    *) fail "there is no verb '$verb': pod.sh --help" ;;
  esac
  DRY_RUN="" KEEP="" COMMIT="" REMINDER="" # They are not the environment's.
  while (($#)); do
    case $1 in
      --settings) file=${2:?"pod.sh: --settings needs a file"} && shift ;;
      --settings=*) file=${1#*=} ;;
      --dry-run) DRY_RUN=yes ;;
      --keep) KEEP=yes ;;
      *) fail "there is no option '$1': pod.sh --help" ;;
    esac
    shift
  done
  POLL_SECONDS=${POLL_SECONDS:-60}      # between two looks at Google Cloud
  LOG_SECONDS=${LOG_SECONDS:-60}        # between two copies of a worker's log
  SETTLE_SECONDS=${SETTLE_SECONDS:-150} # from a worker's end to a verdict; JAX ends others after 100
  SILENT_SECONDS=${SILENT_SECONDS:-900} # without a worker's log, after which it is lost
  STOP_SECONDS=${STOP_SECONDS:-900}     # for a run to save
  load_settings "$file"
  if [[ -z $DRY_RUN ]]; then
    command -v gcloud >/dev/null ||
      fail "there is no gcloud here: https://cloud.google.com/sdk/docs/install"
  fi
  SCRATCH=$(mktemp -d)
  trap at_exit EXIT
  exec 3>&1
  cd "$HERE/.."
  "do_$verb"
}

# What went wrong may have left nodes behind, and their user must not learn it from the bill.
at_exit() {
  local code=$?
  rm -rf "$SCRATCH"
  if ((code)) && [[ -n $REMINDER ]]; then answer "pod.sh: $REMINDER" >&2; fi
}

remind_of_nodes() {
  REMINDER="nodes of $NAME that are there stay, and cost money, until tpu_scripts/pod.sh delete"
}

do_create() {
  remind_of_nodes
  create_pod
  say "next: tpu_scripts/pod.sh setup (from now on the nodes cost money)"
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
  say "the run goes on by itself; tpu_scripts/pod.sh watch keeps it alive"
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
  if [[ $state == ACTIVE ]]; then stop_run; else say "$NAME: nothing runs ($state)"; fi
}

do_delete() {
  mark_as_stopped
  delete_pod
}

main "$@"
