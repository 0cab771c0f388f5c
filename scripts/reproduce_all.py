"""Runs every experiment of ``configs/experiments/``, draws all figures, and ends with a table of what passed.

python scripts/reproduce_all.py --quick             # built-in facts, few edits, one seed; to lightning_logs/quick
python scripts/reproduce_all.py --dry-run           # what would be run, and how long it takes
python scripts/reproduce_all.py --workers 2         # all of it: days on two cores
python scripts/reproduce_all.py --only replay_ablation figures
"""

import sys
from pathlib import Path

from editlab.experiments.reproduce import reproduce

if __name__ == "__main__":
    sys.exit(reproduce(Path(__file__).resolve().parents[1], sys.argv[1:]))
