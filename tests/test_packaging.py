"""The wheel has every recipe, preset and experiment, and every package; without building it."""

import configparser
import runpy
from pathlib import Path

import pytest
import yaml

from editlab.utils.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup():
    """What setup.py gives to setuptools."""
    setuptools = pytest.importorskip("setuptools")
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **named: given.update(named))
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_the_recipes_are_a_package_of_editlab(setup):
    assert setup["package_dir"] == {"editlab.configs": "configs"}
    assert "editlab.configs" in setup["packages"]


def test_every_file_of_configs_is_package_data():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    patterns = config["options.package_data"]["editlab.configs"].split()
    folder = ROOT / "configs"
    assert {path for pattern in patterns for path in folder.glob(pattern)} == {
        path for path in folder.rglob("*") if path.is_file()
    }


def test_every_package_is_in_the_wheel(setup):
    files = [path for name in ("editlab", "callbacks") for path in (ROOT / name).rglob("__init__.py")]
    names = {".".join(path.parent.relative_to(ROOT).parts) for path in files}
    assert set(setup["packages"]) - {"editlab.configs"} == names


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
