"""The documentation: every public name has an entry, every page is in the navigation, every link leads somewhere."""

import ast
import csv
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml

import callbacks
from editlab.data import EditDataModule
from editlab.editor import SequentialEditor
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.values.optimize import ValueSettings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGES = ("editlab", "callbacks")
PAGES = sorted(DOCS.rglob("*.md"))
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
SECTIONS = {"model": SequentialEditor, "data": EditDataModule}
GROUPS = {
    "values": ValueSettings,
    "moments": MomentSettings,
    "contexts": ContextSettings,
    "evaluation": EvaluationSettings,
}
HOWTOS = {"replay": "MemoryReplay", "trust": "TrustRollback", "lora": "LoRAAdjust", "downstream": "DownstreamEval"}


def modules():
    """Dotted names and files of all public modules."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts):
                yield ".".join(parts), path


def public_names(path):
    """The public classes and functions that a module defines, with whether each has a docstring."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node) is not None


def directives():
    """What the reference pages show: dotted names after ``:::``; ``editlab.*`` are the modules at editlab's root."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    named = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    for package in re.findall(r"^::: (\w+)\.\*$", pages, re.MULTILINE):
        named += [name for name, path in modules() if path.parent == ROOT / package and path.name != "__init__.py"]
    return named


def navigation(entry):
    """The pages of a part of the navigation."""
    if isinstance(entry, str):
        return [entry]
    children = entry.values() if isinstance(entry, dict) else entry
    return [page for child in children for page in navigation(child)]


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_public_name_has_an_entry_in_the_reference(module, path):
    names = list(public_names(path))
    assert all(documented for _, documented in names), f"without a docstring: {[n for n, d in names if not d]}"
    # A directive shows a module and the modules below it (show_submodules in mkdocs.yml); those of a package that is
    # shown module by module, such as editlab itself, each need one of their own.
    shown = directives()
    above = [module.rsplit(".", i)[0] for i in range(module.count(".") + 1)]
    assert not names or any(name in shown for name in above), f"add '::: {module}' to a page in docs/reference/"


def test_directives_name_modules_that_exist():
    known = {name for name, _ in modules()}
    assert [name for name in directives() if name not in known] == []


def test_submodules_are_shown():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    options = yaml.safe_load(text)["plugins"][1]["mkdocstrings"]["handlers"]["python"]["options"]
    assert options["show_submodules"] is True
    assert options["filters"] == ["!^_"]


def test_every_page_is_in_the_navigation_once():
    pages = navigation(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(pages) == [page.relative_to(DOCS).as_posix() for page in PAGES]


@pytest.mark.parametrize("page", PROSE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_to_files_lead_to_files(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_outside_docs_that_a_page_links_to_are_on_the_site(page):
    # Read from the hook's source: importing it needs MkDocs, which the tests do without.
    hook = (DOCS / "tools" / "hooks.py").read_text(encoding="utf-8")
    (patterns,) = re.findall(r"^SERVED = (.+)$", hook, re.MULTILINE)
    served = [path for pattern in ast.literal_eval(patterns) for path in ROOT.glob(pattern)]
    (outside,) = re.findall(r"^_OUTSIDE = re\.compile\((r.+)\)$", hook, re.MULTILINE)
    rewritten = re.compile(ast.literal_eval(outside))
    for link in re.findall(r"\]\(\.\./[^)#\s]*", page.read_text(encoding="utf-8")):
        target = (page.parent / link[2:]).resolve()
        if not target.is_relative_to(DOCS):
            assert rewritten.fullmatch(f"{link})"), f"{link[2:]} is not rewritten by docs/tools/hooks.py"
            assert target in served, f"{link[2:]} is not among the hook's SERVED"


@pytest.mark.parametrize("page", PROSE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_name_recipes_that_exist(page):
    recipes = re.findall(r"configs/[\w./-]+\.yaml", page.read_text(encoding="utf-8"))
    assert [name for name in recipes if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PROSE, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_settings_exist(page):
    # As flags (--model.values.steps 20) and as names in backticks (`model.values.steps`, `model.keys: mean`).
    found = re.findall(r"(?:--|`)(model|data)\.(\w+)(?:\.(\w+))?(?=[`:= ])", page.read_text(encoding="utf-8"))
    for section, name, inner in found:
        assert name in inspect.signature(SECTIONS[section]).parameters, f"{section}.{name}"
        if inner and name in GROUPS:
            assert inner in {field.name for field in dataclasses.fields(GROUPS[name])}, f"{section}.{name}.{inner}"


@pytest.mark.parametrize(("page", "name"), HOWTOS.items(), ids=HOWTOS)
def test_settings_of_callbacks_exist(page, name):
    # The table that begins with "setting" has them in its first column: | `rate`, `capacity` | ... |
    text = (DOCS / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| setting \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    named = [n for row in table.splitlines() for n in re.findall(r"`(\w+)", row.split("|")[1])]
    assert named
    assert [n for n in named if n not in inspect.signature(getattr(callbacks, name)).parameters] == []


@pytest.mark.parametrize("page", sorted((DOCS / "results").glob("*.md")), ids=lambda p: p.stem)
def test_rows_of_results_are_cases_of_the_files_that_the_page_names(page):
    text = page.read_text(encoding="utf-8")
    known = set()
    for name in re.findall(r"\]\(\.\./\.\./results/(\w+\.csv)\)", text):
        with (ROOT / "results" / name).open(encoding="utf-8", newline="") as file:
            known |= {row.get("case", "") for row in csv.DictReader(file)}
    assert [case for case in re.findall(r"\| `([\w.]+)` \|$", text, re.MULTILINE) if case not in known] == []


def test_the_readme_is_short_and_has_the_command_that_ci_runs():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert sum(line.endswith("&& pytest") for line in lines) == 1


def test_the_tests_that_the_theory_names_exist():
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "theory.md").read_text(encoding="utf-8")))
    assert len(named) > 10
    assert {name for name in named if f"def {name}(" not in tests} == set()
