"""The report: every number is a cell of results/, every reference is in the bibliography, no line is overfull."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from editlab.experiments.latex import QUANTITY, Results, numbers, table_specs, tabular

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "report"
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(REPORT.glob("*.tex"))}
TEXT = "\n".join(SOURCES.values())
SPECS = table_specs(yaml.safe_load((REPORT / "tables.yaml").read_text(encoding="utf-8")))


def test_every_number_exists():
    defined = numbers(list(SOURCES.values()), Results(ROOT / "results"))
    assert defined.count(r"\csname editlab:") == len(set(QUANTITY.findall(TEXT))) > 50
    assert TEXT.count(r"\val{") + TEXT.count(r"\ci{") == len(QUANTITY.findall(TEXT))  # none is misspelt


@pytest.mark.parametrize("name", SPECS)
def test_every_table_is_made_and_shown_once(name):
    assert TEXT.count(rf"\input{{generated/{name}}}") == 1
    assert r"\midrule" in tabular(SPECS[name], Results(ROOT / "results"))


def test_every_table_that_is_shown_is_described():
    assert set(re.findall(r"\\input\{generated/(\w+)\}", TEXT)) == {*SPECS, "numbers"}


@pytest.mark.parametrize("name", ["abstract", "introduction", "results", "discussion"])
def test_a_measured_number_is_never_typed(name):
    # Settings such as a rate of 0.3 are typed; a number with two digits or more after its point is a measurement.
    typed = re.findall(r"(?<![\w.])\d*\.\d\d+", QUANTITY.sub("", SOURCES[name]))
    assert typed == []


def test_references_are_in_the_bibliography_and_each_is_cited():
    entries = re.findall(r"^@\w+\{([^,]+),", (REPORT / "references.bib").read_text(encoding="utf-8"), re.MULTILINE)
    cited = {key for keys in re.findall(r"\\cite[tp]?\*?\{([^}]+)\}", TEXT) for key in keys.split(",")}
    assert len(entries) == len(set(entries))
    assert cited == set(entries)


def test_cross_references_lead_somewhere():
    labels = re.findall(r"\\label\{([^}]+)\}", TEXT)
    assert len(labels) == len(set(labels))
    assert set(re.findall(r"\\(?:eq)?ref\{([^}]+)\}", TEXT)) <= set(labels)
    figures = re.findall(r"\\includegraphics\[[^]]*\]\{\.\./figs/(\w+)\}", TEXT)
    assert figures
    assert all((ROOT / "figs" / f"{name}.pdf").exists() for name in figures)


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("latexmk") is None, reason="latexmk (TeX Live) is not installed")
def test_the_pages_have_no_overfull_line_and_no_bitmap_font(tmp_path):
    for folder in ("report", "figs", "results", "scripts"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("generated", "final_report.*[!x]")
        )
    subprocess.run(["make", "-C", tmp_path / "report", "-s"], check=True, capture_output=True)
    log = (tmp_path / "report" / "final_report.log").read_text(encoding="latin-1")
    assert not re.findall(r"Overfull|undefined|multiply defined", log)
    fonts = subprocess.run(
        ["pdffonts", tmp_path / "report" / "final_report.pdf"], capture_output=True, text=True, check=True
    )
    assert "Type 3" not in fonts.stdout
