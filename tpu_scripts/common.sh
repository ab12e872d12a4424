# shellcheck shell=bash
# Shared by all commands: messages, settings, and calls to Google Cloud.

ASK_ATTEMPTS=5 # Queries before Google Cloud counts as unreachable.
TRY_AGAIN=75   # Exit code of errors that may go away, as in `grit-jax train`.

# Prints a message; a dry run prints only commands.
say() {
  [[ -n $DRY_RUN ]] || printf '%s\n' "$*"
}

# Prints the result of a function, for $(...).
answer() {
  printf '%s\n' "$*"
}

fail() {
  printf 'pod.sh: %s\n' "$*" >&2
  exit 2
}

fail_for_now() {
  printf 'pod.sh: %s\n' "$*" >&2
  exit "$TRY_AGAIN"
}

# Loads the settings file, and names invalid settings.
load_settings() {
  local file=$1 name
  [[ -f $file ]] ||
    fail "there is no $file: run cp tpu_scripts/settings.example.sh $file, and fill it in"
  NUM_SLICES=1 WEIGHTS="" MAX_TRIES=5 VALID_UNTIL_DURATION="" RUNTIME_VERSION=""
  RUN_HOURS="" PRICE_PER_CHIP_HOUR=""
  OVERRIDES=() CREATE_FLAGS=() SSH_FLAGS=()
  [[ $file == */* ]] || file=./$file # A bare name would be searched in PATH.
  # shellcheck source=settings.example.sh
  source "$file"
  for name in PROJECT ZONE NAME BUCKET ACCELERATOR_TYPE PROVISIONING CONFIG; do
    [[ -n ${!name:-} ]] || fail "$name is empty in $file"
  done
  for name in NUM_SLICES MAX_TRIES; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} in $file is not a positive integer"
  done
  for name in RUN_HOURS PRICE_PER_CHIP_HOUR; do
    [[ ${!name} =~ ^([0-9]+(\.[0-9]+)?)?$ ]] || fail "$name=${!name} in $file is not a number"
  done
  [[ $NAME =~ ^[a-z][a-z0-9-]{0,38}[a-z0-9]$ ]] ||
    fail "NAME=$NAME in $file: use 2 to 40 lowercase letters, digits and hyphens, first a letter"
  [[ $BUCKET != *[:/]* ]] || fail "BUCKET=$BUCKET in $file: use only the bucket's name, without gs://"
  [[ $PROVISIONING =~ ^(spot|reserved|on-demand)$ ]] ||
    fail "PROVISIONING=$PROVISIONING in $file: use spot, reserved or on-demand"
  [[ -z $WEIGHTS || $WEIGHTS == gs://?* ]] || fail "WEIGHTS=$WEIGHTS in $file: use gs://BUCKET/FOLDER"
  FOLDER="gs://$BUCKET/$NAME" # all output of the run
  describe_accelerator "$file"
}

# Sets CHIPS and DEVICES, the number of JAX devices, in all slices, and RUNTIME_VERSION if it is
# not set.
describe_accelerator() {
  local size=${ACCELERATOR_TYPE##*-} version
  [[ $ACCELERATOR_TYPE =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] ||
    fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE in $1: use a type such as v6e-64 or v5litepod-256"
  # The number in a type counts chips for v5e and v6e, and cores, two per chip, for the others.
  # A chip is one JAX device for v4 and v5p, and two for v2 and v3.
  case $ACCELERATOR_TYPE in
    v6e-*) version="v2-alpha-tpuv6e" DEVICES=$size ;;
    v5litepod-*) version="v2-alpha-tpuv5-lite" DEVICES=$size ;;
    v5p-*) version="v2-alpha-tpuv5" DEVICES=$((size / 2)) ;;
    v4-*) version="tpu-ubuntu2204-base" DEVICES=$((size / 2)) ;;
    v2-* | v3-*) version="tpu-ubuntu2204-base" DEVICES=$size ;;
    *) fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE in $1 is not supported: use v2 to v6e. Newer" \
      "types are available through GKE only (docs/pods.md)" ;;
  esac
  RUNTIME_VERSION=${RUNTIME_VERSION:-$version}
  DEVICES=$((DEVICES * NUM_SLICES))
  case $ACCELERATOR_TYPE in
    v2-* | v3-*) CHIPS=$((DEVICES / 2)) ;;
    *) CHIPS=$DEVICES ;;
  esac
}

# Runs a command, or prints it with --dry-run. Descriptor 3 is the output of pod.sh, even inside
# $(...).
run() {
  if [[ -n $DRY_RUN ]]; then
    print_command "$@" >&3
  else
    "$@"
  fi
}

print_command() {
  local word line=""
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+*-]+$ ]]; then
      if [[ $word == *\'* ]]; then word=$(printf '%q' "$word"); else word="'$word'"; fi
    fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

tpus() {
  run gcloud compute tpus "$@" --zone="$ZONE" --project="$PROJECT"
}

# Queries Google Cloud for one value with `tpus`, and prints it, or NONE if it does not exist.
# $1 is the value assumed by a dry run.
ask() {
  local assumed=$1 found attempt
  shift
  for ((attempt = 1; attempt <= ASK_ATTEMPTS; attempt++)); do
    if found=$(tpus "$@" 2>"$SCRATCH/errors"); then
      answer "${DRY_RUN:+$assumed}$found"
      return
    fi
    case $(<"$SCRATCH/errors") in
      *PERMISSION_DENIED* | *SERVICE_DISABLED*) break ;;
      *NOT_FOUND* | *"not found"*) answer NONE && return ;;
    esac
    ((attempt == ASK_ATTEMPTS)) || sleep "$POLL_SECONDS"
  done
  fail "Google Cloud does not answer for PROJECT=$PROJECT and ZONE=$ZONE: $(last_error)"
}

last_error() {
  grep -v '^[[:space:]]*$' "$SCRATCH/errors" | grep -m 1 '^ERROR' || tail -n 1 "$SCRATCH/errors"
}
