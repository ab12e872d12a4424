# shellcheck shell=bash
# What all verbs share: messages, settings, and the way to Google Cloud.

ASK_ATTEMPTS=5 # How often Google Cloud is asked before it counts as out of reach.
TRY_AGAIN=75   # The exit code of what may work next time, here as in `grit-jax train`.

# Tells the user; a dry run prints commands alone.
say() {
  [[ -n $DRY_RUN ]] || printf '%s\n' "$*"
}

# What a function gives back to a $(...).
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

# Reads the settings file, and says which line of it cannot be.
load_settings() {
  local file=$1 name
  [[ -f $file ]] ||
    fail "there is no $file: cp tpu_scripts/settings.example.sh $file, and fill it in"
  NUM_SLICES=1 WEIGHTS="" MAX_TRIES=5 VALID_UNTIL_DURATION="" RUNTIME_VERSION=""
  OVERRIDES=() CREATE_FLAGS=() SSH_FLAGS=()
  [[ $file == */* ]] || file=./$file # A name alone would be looked for in PATH.
  # shellcheck source=settings.example.sh
  source "$file"
  for name in PROJECT ZONE NAME BUCKET ACCELERATOR_TYPE PROVISIONING CONFIG; do
    [[ -n ${!name:-} ]] || fail "$name is empty in $file"
  done
  for name in NUM_SLICES MAX_TRIES; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} in $file is no positive number"
  done
  [[ $NAME =~ ^[a-z][a-z0-9-]{0,38}[a-z0-9]$ ]] ||
    fail "NAME=$NAME in $file: 2 to 40 small letters, digits and hyphens, beginning with a letter"
  [[ $BUCKET != *[:/]* ]] || fail "BUCKET=$BUCKET in $file: the bucket's name alone, without gs://"
  [[ $PROVISIONING =~ ^(spot|reserved|on-demand)$ ]] ||
    fail "PROVISIONING=$PROVISIONING in $file: spot, reserved or on-demand"
  [[ -z $WEIGHTS || $WEIGHTS == gs://?* ]] || fail "WEIGHTS=$WEIGHTS in $file: gs://BUCKET/FOLDER"
  FOLDER="gs://$BUCKET/$NAME" # all that the run leaves
  describe_accelerator "$file"
}

# Sets DEVICES, JAX's number of devices in all slices, and RUNTIME_VERSION if the settings do not.
describe_accelerator() {
  local size=${ACCELERATOR_TYPE##*-} version
  [[ $ACCELERATOR_TYPE =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] ||
    fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE in $1: such as v6e-64 or v5litepod-256"
  # The number in a type is that of chips for v5e and v6e, and of cores, two a chip, for the others.
  # JAX sees a chip of v4 and v5p as one device, and one of v2 and v3 as two.
  case $ACCELERATOR_TYPE in
    v6e-*) version="v2-alpha-tpuv6e" DEVICES=$size ;;
    v5litepod-*) version="v2-alpha-tpuv5-lite" DEVICES=$size ;;
    v5p-*) version="v2-alpha-tpuv5" DEVICES=$((size / 2)) ;;
    v4-*) version="tpu-ubuntu2204-base" DEVICES=$((size / 2)) ;;
    v2-* | v3-*) version="tpu-ubuntu2204-base" DEVICES=$size ;;
    *) fail "ACCELERATOR_TYPE=$ACCELERATOR_TYPE in $1 is not known here: v2 to v6e are. Newer" \
      "ones are had through GKE only (docs/pods.md)" ;;
  esac
  RUNTIME_VERSION=${RUNTIME_VERSION:-$version}
  DEVICES=$((DEVICES * NUM_SLICES))
}

# Runs a command; with --dry-run, prints it as it would be typed. Descriptor 3 is pod.sh's output,
# also where a caller reads this one's.
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

# Asks Google Cloud for one value, as `tpus` does: prints it, or NONE if there is no such thing.
# $1 is what a dry run takes for the answer.
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
