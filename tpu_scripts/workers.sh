# shellcheck shell=bash
# Runs commands on all workers over ssh, and manages launches in the bucket.

WORKER="grit-jax/code/tpu_scripts/worker.sh"

# Runs a command on all workers. Exit code 255 comes from ssh: a worker was not reached.
on_workers() {
  local attempt code
  for attempt in 1 2 3; do
    code=0
    # Workers wait for each other to count devices, so none may be left for a second batch.
    # (According to its source, gcloud still takes 64 at a time.)
    {
      tpus queued-resources ssh "$NAME" --node=all --worker=all --batch-size=all --quiet \
        ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} --command="$1" 2>&1 >&4 | tee "$SCRATCH/ssh" >&2
    } 4>&1 || code=$?
    # gcloud skips nodes that it cannot prepare, with a warning and exit code 0.
    ! grep -q 'Could not prepare all' "$SCRATCH/ssh" || code=255
    ((code)) || return 0
    ((code == 255)) || return "$code"
    ((attempt == 3)) || sleep "$POLL_SECONDS"
  done
  fail_for_now "ssh does not reach all workers of $NAME: see docs/pods.md, 'When ssh fails'"
}

# Quotes words for the shell on the worker.
quoted() {
  printf ' %q' "$@"
}

# Sets COMMIT, the commit that the workers get, once per watch.
choose_commit() {
  local changed
  COMMIT=$(git rev-parse --short=12 HEAD) || fail "this is not a git clone: the workers get its commit"
  changed=$(git status --porcelain --untracked-files=no)
  [[ -z $changed ]] ||
    fail "commit or revert these changes: the workers get the commit $COMMIT"$'\n'"$changed"
  git cat-file -e "$COMMIT:$CONFIG" 2>/dev/null ||
    fail "CONFIG=$CONFIG is not in the commit $COMMIT: git add it and commit"
}

install_on_workers() {
  [[ -n $COMMIT ]] || choose_commit
  # A temporary folder, as another run of this commit may be set up here at the same time.
  local folder=$SCRATCH
  [[ -z $DRY_RUN ]] || folder=${TMPDIR:-/tmp}
  local archive="$folder/grit-jax-$COMMIT.tar.gz" code="$FOLDER/code/$COMMIT.tar.gz"
  run git archive --format=tar.gz --output="$archive" "$COMMIT"
  run gcloud storage cp --quiet "$archive" "$code" 2>"$SCRATCH/errors" || fail_bucket "written to"
  run rm "$archive"
  local target="grit-jax/$COMMIT" command
  command="mkdir -p $target && gcloud storage cat $code | tar -xzf - -C $target &&"
  command+=" bash $target/tpu_scripts/worker.sh setup $COMMIT$(quoted ${WEIGHTS:+"$WEIGHTS"})"
  on_workers "$command" || fail_setup "could not be installed"
}

count_devices() {
  on_workers "bash $WORKER check $DEVICES" || fail_setup "does not find its $DEVICES devices"
  say "$NAME: $COMMIT is installed on all workers, with $DEVICES devices in total"
}

fail_bucket() {
  fail "the bucket gs://$BUCKET cannot be $1: see docs/pods.md, 'The bucket'. $(last_error)"
}

fail_setup() {
  check_is_whole
  fail "grit-jax $1 on $NAME: see the workers' messages above"
}

check_is_whole() {
  is_whole ||
    fail_for_now "some nodes of $NAME do not exist: not created yet, or preempted"
}

# Prints the folder of the next launch. Names sort by time, in seconds.
new_launch() {
  [[ -n $DRY_RUN ]] || sleep 1
  answer "$FOLDER/launches/$(date -u +%Y%m%dT%H%M%SZ)"
}

# Prints the newest launch, or nothing if there is none.
newest_launch() {
  local found
  found=$(run gcloud storage ls "$FOLDER/launches/" 2>"$SCRATCH/errors" | sort | tail -n 1) ||
    grep -q "matched no objects" "$SCRATCH/errors" || fail_bucket read
  answer "${found%/}"
}

# Starts the run on all workers, each in its own session.
start_run() {
  local launch=$1 arguments command
  arguments=$(quoted --config "$CONFIG" --workdir "$FOLDER/run" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
  # The worker's shell expands $HOME.
  # shellcheck disable=SC2016
  [[ -z $WEIGHTS ]] || arguments+=' --config.model.weights=$HOME/grit-jax/weights'
  command="LOG_SECONDS=$LOG_SECONDS bash $WORKER start $COMMIT $launch$arguments"
  on_workers "$command" || fail_launch
  say "$NAME: launched, with logs in $launch"
}

fail_launch() {
  check_is_whole
  fail "the run could not be launched on all workers: see their messages above"
}

# Makes the run save and exit on all workers.
stop_run() {
  on_workers "STOP_SECONDS=$STOP_SECONDS bash $WORKER stop" ||
    fail "the run on $NAME could not be stopped: run tpu_scripts/pod.sh delete to end it"
}

# Keeps a watch on any machine from restarting the run. Bucket errors must not prevent deletion.
mark_as_stopped() {
  (mark_newest_launch) || say "cannot notify a watch on another machine: end it, or it restarts the run"
}

mark_newest_launch() {
  local launch
  launch=$(newest_launch) || exit
  [[ -z $DRY_RUN ]] || launch="$FOLDER/launches/NEWEST"
  [[ -z $launch ]] || put_text stopped "$launch/stopped"
}

# Writes one line to an object.
put_text() {
  if [[ -n $DRY_RUN ]]; then
    answer "echo $1 | $(print_command gcloud storage cp - "$2")" >&3
  else
    answer "$1" | gcloud storage cp --quiet - "$2" 2>"$SCRATCH/errors" || fail_bucket "written to"
  fi
}

show_status() {
  local node state launch
  state=$(queued_resource_state ACTIVE)
  say "queued resource $NAME: $state"
  if [[ $state == ACTIVE ]]; then
    for node in $(node_names); do say "node $node: $(node_state "$node" READY)"; done
    (on_workers "bash $WORKER status") || say "cannot get the status of the workers"
  fi
  launch=$(newest_launch)
  say "newest launch: ${launch:-none}"
  say "newest metrics: $(run gcloud storage cat "$FOLDER/run/metrics.jsonl" 2>/dev/null | tail -n 1)"
}
