"""What MkDocs needs beyond its settings: the repository's figures, tables and recipes become part of the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
SERVED = ("figs/*.png", "results/*.csv", "results/*.jsonl", "results/*.json", "configs/**/*.yaml")
"""Files outside docs/ that pages link to."""

_ROOT_MODULES = re.compile(r"^::: (?P<package>\w+)\.\*$", re.MULTILINE)
_OUTSIDE = re.compile(r"\]\((?P<up>(?:\.\./)*)\.\./(?P<path>(?:figs|results|configs)/[^)]+\.(?:png|csv|jsonl?|yaml))\)")


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Adds the files of :data:`SERVED` to the site, under ``repository/``."""
    for pattern in SERVED:
        for path in sorted(ROOT.glob(pattern)):
            uri = f"repository/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def root_modules(match: re.Match[str]) -> str:
    """One directive for each public module at the root of a package: what ``::: editlab.*`` stands for."""
    package = match["package"]
    return "\n\n".join(
        f"::: {package}.{path.stem}" for path in sorted((ROOT / package).glob("*.py")) if not path.stem.startswith("_")
    )


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Points links that leave docs/ at the copies that :func:`on_files` adds, and expands ``::: editlab.*``.

    In the repository ``../../figs/x.png`` is right for a page in ``docs/results/``; on the site the same figure is at
    ``../repository/figs/x.png``.
    """
    return _OUTSIDE.sub(r"](\g<up>repository/\g<path>)", _ROOT_MODULES.sub(root_modules, markdown))
