#!/usr/bin/env bash
# Trains on a TPU pod slice: runs the same command on all of its VMs.
#
#     export TPU=my-slice ZONE=us-west4-a
#     launch/tpu_pod.sh setup
#     launch/tpu_pod.sh train --config mae:vit_l16 --workdir /mnt/shared/runs/mine
#     launch/tpu_pod.sh stop
#
# Expects the gcloud CLI, logged in to the project of the slice, and ssh access to its VMs. The data
# and --workdir must lie where all VMs see them under one path: a Filestore share, or a bucket
# mounted with Cloud Storage FUSE.
#
#   setup   copies the last commit of this checkout to every VM and makes the environment there;
#           run it again after a commit.
#   train   starts `mim-jax train --distributed` with the given flags on every VM and shows their
#           output. JAX finds the processes by the slice's metadata.
#   stop    asks a running `train` to save and leave, after the same step on all VMs.
#
# After anything went wrong (a lost connection, an ssh error on one VM, a slice that was pre-empted
# and made again, which needs `setup`): `stop` what may still be running, then give the same `train`
# again. It goes on from the newest checkpoint; a half-written one is never used. "The TPU is
# already in use by process ..." means that an earlier run still holds it.
set -euo pipefail

usage() {
  sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [[ -z "${TPU:-}" || -z "${ZONE:-}" || $# -eq 0 ]]; then
  usage
fi
verb="$1"
shift
case "$verb" in
  setup)
    archive="$(mktemp -d)/mim_jax.tar.gz"
    trap 'rm -r "$(dirname "$archive")"' EXIT
    git -C "$(dirname "${BASH_SOURCE[0]}")/.." archive --format=tar.gz --output="$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU:" --zone="$ZONE" --worker=all
    # The VMs' own Python may be older than 3.11.
    # shellcheck disable=SC2016 # expands there
    on_all 'python3 -m pip install --quiet --user uv && ~/.local/bin/uv python install 3.12 &&
      python="$(~/.local/bin/uv python find 3.12)" && mkdir -p mim_jax && cd mim_jax &&
      tar xzf ../mim_jax.tar.gz && "$python" launch/start.py --extra tpu mim-jax --version'
    ;;
  train)
    on_all "cd mim_jax && exec .venv/bin/mim-jax train --distributed $(printf '%q ' "$@")"
    ;;
  stop)
    on_all "pkill -TERM -f '[m]im-jax train' || true"
    ;;
  *)
    usage
    ;;
esac
