#!/usr/bin/env bash
# The same as python scripts/run_all_baselines.py, from any folder.
exec "${PYTHON:-python}" "$(dirname "$0")/run_all_baselines.py" "$@"
