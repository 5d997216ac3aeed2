#!/usr/bin/env bash
# Trains on this machine, on all of its devices, in one process.
#
#     launch/local.sh --config mae:vit_b16 --data folder:/data/images --workdir runs/mine
#
# Expects Python 3.11 to 3.13; for NVIDIA GPUs a driver that knows CUDA 13, for TPUs a TPU VM. The
# first call makes the environment .venv, with JAX for the devices that it finds. All flags go to
# `mim-jax train`; the mesh is set by --config.mesh.data, .fsdp and .tensor.
#
# Exit code: that of `mim-jax train`, so 75 after SIGTERM or Ctrl-C once everything is saved.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

set -- mim-jax train "$@"
if command -v nvidia-smi > /dev/null; then
  set -- --extra cuda "$@"
elif [[ -e /dev/accel0 || -e /dev/vfio/0 ]]; then
  set -- --extra tpu "$@"
fi
exec python3 "$root/launch/start.py" "$@"
