"""ROME, MEMIT, EMMET and AlphaEdit on the same facts: ``editlab sweep configs/experiments/baselines.yaml``.

python scripts/run_all_baselines.py                    # every method, both ways; resumes what was stopped
python scripts/run_all_baselines.py --only rome_sequential emmet_sequential
python scripts/run_all_baselines.py --dry-run
"""

import sys
from pathlib import Path

from editlab.cli.main import main

EXPERIMENT = Path(__file__).resolve().parents[1] / "configs" / "experiments" / "baselines.yaml"

if __name__ == "__main__":
    sys.exit(main(["sweep", str(EXPERIMENT), *sys.argv[1:]]))
