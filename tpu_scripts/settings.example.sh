# shellcheck shell=bash disable=SC2034
# One run on one pod. Copy this file to settings.sh, fill it in, and leave secrets out: none is needed.

PROJECT=""                     # id of the Google Cloud project
ZONE=""                        # such as us-east5-b; it must offer the accelerator type
NAME="gritlm-7b"               # of the run: of its nodes, and of its folder in the bucket
BUCKET=""                      # without gs://, in the same region as the zone

ACCELERATOR_TYPE="v6e-64"      # v4-N, v5litepod-N, v5p-N or v6e-N, as Google Cloud counts them
PROVISIONING="spot"            # spot, reserved or on-demand
NUM_SLICES=1                   # of that type; above 1, add --config.mesh.slice to the overrides

# What is trained. The working directory is gs://BUCKET/NAME/run.
CONFIG="configs/gritlm_7b.py"
WEIGHTS="gs://$BUCKET/Mistral-7B-v0.1"  # copied to each worker's disk; "" for random weights
OVERRIDES=(
  --config.data.folder="gs://$BUCKET/data/mine"
  --config.data.embedding=mine_embedding
  --config.data.generative=mine_chat
  --config.checkpoint.every_steps=100
)

# What may stay as it is.
MAX_TRIES=5                    # starts in a row without a new checkpoint, after which watch gives up
VALID_UNTIL_DURATION=""        # such as 6h: how long to wait for the nodes; "" for as long as it takes
RUNTIME_VERSION=""             # of the TPU software; "" for the one that goes with the type
CREATE_FLAGS=()                # more for `queued-resources create`, such as --service-account=...
SSH_FLAGS=()                   # more for `queued-resources ssh`, such as --tunnel-through-iap
