"""Batch size x replay rate x LoRA rank: ``editlab sweep configs/experiments/batch_experiments.yaml``.

python scripts/run_batch_experiments.py --dry-run
python scripts/run_batch_experiments.py --where batch_size=32,128 replay_rate=0,0.3 lora_rank=none --seeds 1
python scripts/run_batch_experiments.py --launcher ray --workers 2     # on the machines of a Ray cluster
"""

import sys
from pathlib import Path

from editlab.cli.main import main

EXPERIMENT = Path(__file__).resolve().parents[1] / "configs" / "experiments" / "batch_experiments.yaml"

if __name__ == "__main__":
    sys.exit(main(["sweep", str(EXPERIMENT), *sys.argv[1:]]))
