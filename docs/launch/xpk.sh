#!/bin/bash
# A training run on a TPU slice under GKE with XPK: docs/launch/xpk.sh 27b --mesh.fsdp 64 --data.source 'gs://bucket/text/*.jsonl' ...
# Many runs, a job each: mhc-jax sweep FILE --launch xpk writes files like this one.
# One process a host. GKE tells each its place (TPU_WORKER_HOSTNAMES, TPU_WORKER_ID), which JAX reads by itself.
set -euo pipefail

: "${CLUSTER:?the cluster that xpk cluster create made}"
: "${BUCKET:?gs://bucket for the run folder}"
: "${IMAGE:?a container image with mhc-jax[tpu,remote] installed}"
NAME=${NAME:-mhc-jax}
TPU_TYPE=${TPU_TYPE:-v6e-64}

# XPK starts all hosts again when one fails, and the command goes on from the last checkpoint.
xpk workload create \
    --cluster "$CLUSTER" \
    --workload "$NAME" \
    --tpu-type "$TPU_TYPE" \
    --num-slices 1 \
    --docker-image "$IMAGE" \
    --max-restarts 50 \
    --command "mhc-jax train $(printf '%q ' "$@")--out $BUCKET/runs/$NAME"
