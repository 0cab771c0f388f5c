#!/usr/bin/env bash
# The same as python scripts/reproduce_all.py, from any folder.
exec "${PYTHON:-python}" "$(dirname "$0")/reproduce_all.py" "$@"
