#!/usr/bin/env bash
# Continues the training of the embedded weights on a GPU, in at most eight minutes. See train.py and benchmarks/README.md.
set -eu
cd "$(dirname "$0")/../.."
PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 exec "${PYTHON:-python3}" benchmarks/gpu/train.py "$@"
