#!/usr/bin/env bash
# Measures everything that needs a GPU, in at most six minutes. See measure.py and benchmarks/README.md.
set -eu
cd "$(dirname "$0")/../.."
# PyTorch then looks for GPUs without starting CUDA, which forked processes could not use.
export PYTORCH_NVML_BASED_CUDA_CHECK=1
PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 exec "${PYTHON:-python3}" benchmarks/gpu/measure.py "$@"
