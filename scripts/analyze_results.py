"""Draws every figure whose table exists in ``results/``, as ``.png`` and ``.pdf``; needs no runs.

python scripts/analyze_results.py
python scripts/analyze_results.py --only batch_size radar
python scripts/analyze_results.py --out lightning_logs/quick    # results/ and figs/ of another folder
"""

import sys
from pathlib import Path

from editlab.experiments.reproduce import draw_figures

if __name__ == "__main__":
    sys.exit(draw_figures(Path(__file__).resolve().parents[1], sys.argv[1:]))
