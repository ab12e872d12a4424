# shellcheck shell=bash
# Keeps a run alive: creates nodes, sets up and launches after each loss until it finishes.

# OUTCOME is the state of a launch: none, running, finished, failed, stopped or lost (to be
# restarted). WHY is the reason.

watch_run() {
  choose_commit
  ASK_ATTEMPTS=60
  TRIES=0 CHECKPOINT=0 HAS_STARTED=""
  REMINDER="watch has ended. An active run continues, and the nodes of $NAME cost money:"
  REMINDER+=" run watch again, or delete"
  trap 'exit 130' INT TERM
  LAUNCH=$(newest_launch)
  judge
  [[ $OUTCOME == none ]] || say "$NAME: the newest launch is $OUTCOME"
  while [[ $OUTCOME != finished ]]; do
    if [[ $OUTCOME != running ]]; then
      count_try
      bring_up
    fi
    [[ $OUTCOME != running ]] || follow
    say "$(date '+%H:%M:%S') $NAME: $OUTCOME$WHY"
    case $OUTCOME in
      failed)
        show_log || true
        give_up "the run failed$WHY"
        ;;
      stopped)
        say "the nodes of $NAME may still exist and cost money: run launch, watch or delete"
        return
        ;;
    esac
  done
  release
  say "$NAME has finished: $FOLDER/run"
}

# Counts the launches since the last new checkpoint.
count_try() {
  local newest
  newest=$(newest_checkpoint)
  if ((newest > CHECKPOINT)); then TRIES=0 CHECKPOINT=$newest; fi
  TRIES=$((TRIES + 1))
  ((TRIES <= MAX_TRIES)) || give_up "$MAX_TRIES consecutive launches made no new checkpoint$WHY"
  say "$(date '+%H:%M:%S') $NAME: launch $TRIES of at most $MAX_TRIES from step $CHECKPOINT"
}

newest_checkpoint() {
  local found
  found=$(run gcloud storage ls "$FOLDER/run/checkpoints/" 2>/dev/null |
    sed -n 's:.*/\([0-9][0-9]*\)/$:\1:p' | sort -n | tail -n 1) || true
  answer "${found:-0}"
}

# Makes a new launch from any state.
bring_up() {
  local code
  LAUNCH=$(new_launch)
  # From now on this is the newest launch, which `stop` and `delete` mark.
  put_text "$COMMIT" "$LAUNCH/commit"
  # In a subshell, so that `fail` does not end the watch.
  set +e
  (
    set -e
    make_ready
    read_launch
    ((IS_STOPPED)) || start_run "$LAUNCH"
  )
  code=$?
  set -e
  OUTCOME=running WHY=""
  read_launch
  if ((IS_STOPPED)); then
    OUTCOME=stopped
  elif ((code == 0)); then
    HAS_STARTED=yes
  elif ((code == TRY_AGAIN)) || [[ -n $HAS_STARTED ]]; then
    # Unreachable nodes do not recover, and the quota of deleted nodes is freed late.
    delete_pod
    OUTCOME=lost WHY=": it could not be started (see above)"
    sleep "$POLL_SECONDS"
  else
    give_up "it could not be started (see above)"
  fi
}

make_ready() {
  local state is_used=""
  state=$(queued_resource_state NONE)
  case $state in
    ACTIVE) if is_whole; then is_used=yes; else delete_pod && create_pod; fi ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING) delete_pod && create_pod ;;
    NONE) create_pod ;;
    *) wait_for_nodes ;;
  esac
  install_on_workers
  [[ -z $is_used ]] || stop_run # A remaining run would hold the TPU.
  count_devices
}

# Waits until the launch has an outcome.
follow() {
  local state oldest="" heard=$SECONDS ended=""
  WHY=""
  while :; do
    state=$(queued_resource_state ACTIVE)
    read_launch
    [[ -z $DRY_RUN ]] || { OUTCOME=finished && return; }
    [[ $OLDEST_LOG == "$oldest" ]] || { oldest=$OLDEST_LOG && heard=$SECONDS; }
    ((ENDED == 0)) || ended=${ended:-$SECONDS}
    if ((ENDED > 0 && ENDED >= WORKERS)) && [[ $(verdict) == finished ]]; then
      OUTCOME=finished && return
    elif ((IS_STOPPED)); then
      OUTCOME=stopped && return
    elif [[ $state != ACTIVE ]]; then
      OUTCOME=lost WHY=": its nodes are gone ($state)" && return
    elif [[ -n $ended ]] && ((ENDED > 0 && SECONDS - ended >= SETTLE_SECONDS)); then
      OUTCOME=$(verdict) WHY=" with the exit codes ${CODES//$'\n'/, }"
      # A preemption can end the run before the nodes are reported gone.
      [[ $OUTCOME != failed ]] || is_whole || OUTCOME=lost
      return
    elif ((SECONDS - heard >= SILENT_SECONDS)); then
      OUTCOME=lost WHY=": no log from a worker for $SILENT_SECONDS seconds" && return
    fi
    sleep "$POLL_SECONDS"
  done
}

# Sets OUTCOME for the newest launch if no watch followed it.
judge() {
  OUTCOME=none WHY=""
  [[ -n $LAUNCH ]] || return 0
  read_launch
  if ((WORKERS == 0)); then
    OUTCOME=none
  elif ((ENDED >= WORKERS)); then
    OUTCOME=$(verdict)
  elif ((IS_STOPPED)); then
    OUTCOME=stopped
  elif is_whole; then
    OUTCOME=running HAS_STARTED=yes
  else
    OUTCOME=lost
  fi
}

# Reads the launch's files in the bucket: sets WORKERS, OLDEST_LOG, IS_STOPPED, CODES, and ENDED, the
# number of workers with a readable exit code.
read_launch() {
  local listing
  listing=$(run gcloud storage ls --long "$LAUNCH/" 2>/dev/null) || listing=""
  WORKERS=$(grep -c '\.log$' <<<"$listing") || true
  IS_STOPPED=$(grep -c '/stopped$' <<<"$listing") || true
  OLDEST_LOG=$(awk '/\.log$/ { print $2 }' <<<"$listing" | sort | head -n 1)
  CODES=""
  if grep -q '\.exit_code$' <<<"$listing"; then
    CODES=$(gcloud storage cat "$LAUNCH/*.exit_code" 2>/dev/null) || CODES=""
  fi
  ENDED=$(wc -w <<<"$CODES")
}

# Combines the exit codes: any error means failed, otherwise any loss means lost.
verdict() {
  local code found=finished
  for code in $CODES; do
    if is_error "$code"; then answer failed && return; fi
    ((code == 0)) || found=lost
  done
  answer "$found"
}

# 75 means that the run saved; from 128 on, a signal ended it, as JAX does to workers that lost
# another.
is_error() {
  (($1 != 0 && $1 != TRY_AGAIN && $1 < 128))
}

# Prints the end of the log of a worker with an error.
show_log() {
  local file code
  for file in $(gcloud storage ls "$LAUNCH/*.exit_code"); do
    code=$(gcloud storage cat "$file")
    if is_error "$code"; then
      say "end of ${file%.exit_code}.log:"
      gcloud storage cat "${file%.exit_code}.log" | tail -n 20
      return
    fi
  done
}

release() {
  REMINDER=""
  if [[ -n $KEEP ]]; then
    say "$NAME: the nodes are kept, and cost money until you delete them"
  else
    delete_pod
  fi
}

give_up() {
  release
  printf 'pod.sh: %s\n' "$NAME: $1. See the logs in $FOLDER/launches" >&2
  exit 1
}
