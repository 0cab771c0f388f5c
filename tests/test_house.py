"""The structure of the packages: which module may import which, read from the sources, TYPE_CHECKING imports included.

``lint-imports`` checks the same contract in CI; this test needs nothing but Python.
"""

import ast
import configparser
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("editlab", "callbacks")
LARGEST_ROOT = 6
"""Modules that may lie at the root of editlab; everything else has a package."""


def modules(folder):
    """Module name -> file of all modules in a folder of the repository."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in modules(package).items()}


def imports(path, known):
    """Names of the modules in ``known`` that a file imports, wherever in the file and under whatever condition."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # Of ``from a import b`` b is a module or a name in a.
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else str(node.module))
    return found & set(known)


IMPORTS = {name: imports(path, MODULES) for name, path in MODULES.items()}


def circle(graph):
    """Modules of a circle in a graph of imports, the first one repeated at the end; [] if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_all_ways_to_import_count(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nimport editlab.errors\nif TYPE_CHECKING:\n    from editlab import editor\n"
        "def f():\n    from editlab.lm.forward import by_row\n",
        encoding="utf-8",
    )
    assert imports(path, MODULES) == {"editlab.errors", "editlab.editor", "editlab.lm.forward"}


def test_no_module_is_in_a_circle_of_imports():
    assert circle(IMPORTS) == []


@pytest.mark.parametrize("package", sorted(name for name, path in MODULES.items() if path.name == "__init__.py"))
def test_the_parts_of_a_package_are_in_no_circle(package):
    """A subpackage counts as one part, whichever of its modules imports or is imported."""
    graph = {}
    for name, targets in IMPORTS.items():
        parts = [
            f"{package}.{one.removeprefix(package).split('.')[1]}"
            for one in (name, *targets)
            if one.startswith(f"{package}.")
        ]
        if name.startswith(f"{package}."):
            graph.setdefault(parts[0], set()).update(set(parts[1:]) - {parts[0]})
    assert circle(graph) == []


def layers():
    """Names of editlab's layers from the top, as the contract in setup.cfg lists them."""
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["importlinter:contract:layers"]["layers"].split("\n")
    return [line.strip().strip("()") for line in lines if line.strip() and not line.strip().startswith("#")]


def test_a_layer_imports_only_layers_below_it():
    order = layers()
    above = []
    for name, targets in IMPORTS.items():
        for target in targets:
            if name.startswith("editlab.") and target.startswith("editlab."):
                importer, imported = name.split(".")[1], target.split(".")[1]
                if order.index(importer) > order.index(imported):
                    above.append((name, target))
    assert above == []


def test_every_module_and_package_of_editlab_is_in_a_layer():
    assert {name.split(".")[1] for name in MODULES if name.startswith("editlab.")} <= set(layers())


def test_few_modules_lie_at_the_root():
    found = [path.name for path in (ROOT / "editlab").glob("*.py")]
    assert len(found) <= LARGEST_ROOT, found


def test_editlab_imports_no_callback():
    assert [
        (name, target)
        for name, targets in IMPORTS.items()
        for target in targets
        if name.split(".")[0] == "editlab" and target.split(".")[0] == "callbacks"
    ] == []


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_script_is_imported(folder):
    scripts = modules("scripts")
    assert {name: found for name, path in modules(folder).items() if (found := imports(path, scripts))} == {}
