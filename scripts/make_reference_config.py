"""Writes configs/reference.yaml, with every setting of ``editlab fit``, from the docstrings.

python scripts/make_reference_config.py
"""

from pathlib import Path

from editlab.cli.reference_config import reference_config
from editlab.utils.files import atomic_file

FILE = Path(__file__).resolve().parents[1] / "configs" / "reference.yaml"

if __name__ == "__main__":
    with atomic_file(FILE) as temporary:
        temporary.write_text(reference_config(), encoding="utf-8")
