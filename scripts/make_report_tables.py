"""Writes report/generated/: every number and table of the report as LaTeX, from results/.

python scripts/make_report_tables.py
"""

import argparse
from pathlib import Path

import yaml

from editlab.experiments.latex import Results, numbers, table_specs, tabular
from editlab.utils.files import atomic_file

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "report"


def write(name: str, text: str) -> None:
    """Write a file of report/generated/ as a whole."""
    with atomic_file(REPORT / "generated" / name) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    """Write the numbers, then the tables."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = Results(ROOT / "results")
    sources = [path.read_text(encoding="utf-8") for path in sorted(REPORT.glob("*.tex"))]
    specs = table_specs(yaml.safe_load((REPORT / "tables.yaml").read_text(encoding="utf-8")))
    write("numbers.tex", numbers(sources, results))
    for name, spec in specs.items():
        write(f"{name}.tex", tabular(spec, results))


if __name__ == "__main__":
    main()
