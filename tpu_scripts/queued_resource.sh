# shellcheck shell=bash
# Creates, inspects and deletes the nodes, a queued resource of Google Cloud.

# Prints ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ... or NONE; $1 is the state for a dry run.
queued_resource_state() {
  ask "$1" queued-resources describe "$NAME" --format="value(state.state)"
}

node_names() {
  local number
  if ((NUM_SLICES == 1)); then
    answer "$NAME"
    return
  fi
  for ((number = 0; number < NUM_SLICES; number++)); do answer "$NAME-$number"; done
}

# Prints READY, PREEMPTED, ... or NONE.
node_state() {
  ask "$2" tpu-vm describe "$1" --format="value(state)"
}

# Succeeds if all nodes exist and are ready.
is_whole() {
  local node state
  state=$(queued_resource_state ACTIVE) || exit
  [[ $state == ACTIVE ]] || return
  for node in $(node_names); do
    state=$(node_state "$node" READY) || exit
    [[ $state == READY ]] || return
  done
}

# Requests the nodes and waits for them. Deletes a failed request.
create_pod() {
  local state
  state=$(queued_resource_state NONE)
  [[ $state == NONE ]] ||
    fail "the queued resource $NAME already exists ($state): continue with setup, or delete it"
  check_accelerator_is_offered
  check_nodes_are_free
  show_cost
  request_nodes
  wait_for_nodes
}

check_accelerator_is_offered() {
  local found
  found=$(ask "$ACCELERATOR_TYPE" tpu-vm accelerator-types describe "$ACCELERATOR_TYPE" \
    --format="value(type)")
  [[ $found != NONE ]] ||
    fail "there is no $ACCELERATOR_TYPE in the zone $ZONE, or no such zone; see" \
      "https://cloud.google.com/tpu/docs/regions-zones"
}

check_nodes_are_free() {
  local node state
  for node in $(node_names); do
    state=$(node_state "$node" NONE)
    [[ $state == NONE ]] ||
      fail "there is a node $node in $ZONE already that this run did not create: choose another" \
        "NAME, or delete it with: gcloud compute tpus tpu-vm delete $node"
  done
}

# Prints what the nodes cost, in chip-hours, and in money for PRICE_PER_CHIP_HOUR.
show_cost() {
  local hours=${RUN_HOURS:-1} cost text
  cost=$(LC_ALL=C awk -v hours="$hours" -v chips="$CHIPS" -v price="${PRICE_PER_CHIP_HOUR:-0}" 'BEGIN {
    printf "%.10g chip-hours", hours * chips
    if (price) printf ", %.2f at %s each", hours * chips * price, price
  }')
  text="$NAME: $CHIPS chips for $RUN_HOURS hours (RUN_HOURS): $cost"
  if [[ -z $RUN_HOURS ]]; then
    text="$NAME: $CHIPS chips, per hour $cost; for a run, set RUN_HOURS to the hours that"
    text+=" grit-jax plan prints (docs/pods.md)"
  fi
  if [[ -n $DRY_RUN ]]; then printf '# %s\n' "$text" >&3; else say "$text"; fi
}

request_nodes() {
  local flags=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
  if ((NUM_SLICES == 1)); then
    flags+=(--node-id="$NAME")
  else
    flags+=(--node-count="$NUM_SLICES" --node-prefix="$NAME")
  fi
  [[ $PROVISIONING == on-demand ]] || flags+=("--$PROVISIONING")
  [[ -z $VALID_UNTIL_DURATION ]] || flags+=(--valid-until-duration="$VALID_UNTIL_DURATION")
  tpus queued-resources create "$NAME" "${flags[@]}" ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} \
    2>"$SCRATCH/errors" || explain_refusal
}

explain_refusal() {
  local advice="nothing was created"
  case $(<"$SCRATCH/errors") in
    *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      advice="there is no quota for $ACCELERATOR_TYPE ($PROVISIONING) in $ZONE. Request it at"
      advice+=" https://console.cloud.google.com/iam-admin/quotas?project=$PROJECT, or use another"
      advice+=" ZONE, ACCELERATOR_TYPE or PROVISIONING"
      ;;
    *ALREADY_EXISTS* | *"already exists"*) advice="choose another NAME, or delete the existing resource" ;;
    *SERVICE_DISABLED* | *"has not been used"*)
      advice="run gcloud services enable tpu.googleapis.com --project=$PROJECT"
      ;;
    *PERMISSION_DENIED*) advice="your account needs the role roles/tpu.admin in $PROJECT" ;;
  esac
  fail "Google Cloud refused the nodes: $advice. Its message: $(last_error)"
}

# Waits in the queue. An interruption keeps the request.
wait_for_nodes() {
  local state before=""
  while :; do
    state=$(queued_resource_state ACTIVE)
    [[ $state == "$before" ]] || say "$(date '+%H:%M:%S') $NAME: $state"
    before=$state
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING | NONE)
        tpus queued-resources describe "$NAME" --format="yaml(state)" || true
        delete_pod
        fail_for_now "the nodes of $NAME were not created ($state, see above); nothing is left"
        ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

# Deletes the queued resource and its nodes if they exist.
delete_pod() {
  local attempt state
  for ((attempt = 1; attempt <= ASK_ATTEMPTS; attempt++)); do
    state=$(queued_resource_state ACTIVE) || exit
    if [[ $state == NONE ]]; then
      say "$NAME: there are no nodes"
      return
    fi
    # Suspended and failed resources still count against the quota, so delete them too.
    if tpus queued-resources delete "$NAME" --force --quiet 2>"$SCRATCH/errors"; then
      say "$NAME: the nodes are deleted"
      return
    fi
    say "$(date '+%H:%M:%S') $NAME is not deleted yet: $(last_error)"
    ((attempt == ASK_ATTEMPTS)) || sleep "$POLL_SECONDS"
  done
  fail "$NAME could not be deleted, and MAY STILL COST MONEY: $(last_error)"
}
