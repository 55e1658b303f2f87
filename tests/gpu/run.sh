#!/usr/bin/env bash
# All that a GPU is needed for; see run.py. PYTHON names another interpreter than python3.
cd "$(dirname "$0")/../.." && exec "${PYTHON:-python3}" tests/gpu/run.py "$@"
