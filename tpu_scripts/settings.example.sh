# shellcheck shell=bash disable=SC2034
# Settings of one run. Copy this file to settings.sh and fill it in. No secrets are needed.

PROJECT=""                     # id of the Google Cloud project
ZONE=""                        # such as us-east5-b; must offer the accelerator type
NAME="gritlm-7b"               # name of the run, its nodes, and its folder in the bucket
BUCKET=""                      # without gs://, in the same region as the zone

ACCELERATOR_TYPE="v6e-64"      # v4-N, v5litepod-N, v5p-N or v6e-N, as Google Cloud counts them
PROVISIONING="spot"            # spot, reserved or on-demand
NUM_SLICES=1                   # slices of that type; above 1, also set --config.mesh.slice below

# The training run. Its working directory is gs://BUCKET/NAME/run.
CONFIG="configs/gritlm_7b.py"
WEIGHTS="gs://$BUCKET/Mistral-7B-v0.1"  # copied to each worker's disk; "" for random weights
OVERRIDES=(
  --config.data.folder="gs://$BUCKET/data/mine"
  --config.data.embedding=mine_embedding
  --config.data.generative=mine_chat
  --config.checkpoint.every_steps=100
)

# What the run costs is shown before the nodes are requested.
RUN_HOURS=""                   # expected hours of the run, such as those of grit-jax plan
PRICE_PER_CHIP_HOUR=""         # such as 2.70

# Defaults that rarely need changes.
MAX_TRIES=5                    # consecutive launches without a new checkpoint before watch gives up
VALID_UNTIL_DURATION=""        # maximum wait for the nodes, such as 6h; "" for no limit
RUNTIME_VERSION=""             # TPU software version; "" for the one of the type
CREATE_FLAGS=()                # extra flags of `queued-resources create`, such as --service-account=...
SSH_FLAGS=()                   # extra flags of `queued-resources ssh`, such as --tunnel-through-iap
