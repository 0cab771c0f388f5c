"""A griffe extension: Sphinx's roles become links, doctests become code, and each object is shown once, where it is."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):`(?P<short>~?)(?P<name>[\w.]+)`")
_LITERAL = re.compile(r"::$", re.MULTILINE)
_DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
"""A doctest goes from its prompt to the next empty line, as Python's doctest reads it."""


class Roles(griffe.Extension):
    """Rewrites docstrings when they are loaded."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of one module, class, function or attribute."""
        if obj.docstring is None:
            return

        def link(match: re.Match[str]) -> str:
            name = match["name"]
            shown = name.rsplit(".", 1)[-1] if match["short"] else name
            if not name.startswith(("editlab.", "callbacks.")):
                name = f"{obj.module.path}.{name}"
            return f'<autoref identifier="{name}" optional><code>{shown}</code></autoref>'

        text = _LITERAL.sub(":", _ROLE.sub(link, obj.docstring.value))
        obj.docstring.value = _DOCTEST.sub(r"```pycon\n\g<0>\n```", text)  # Markdown takes >>> for nested quotations

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Takes re-exports out of packages, which would be shown a second time under the package's own name."""
        packages = [pkg]
        while packages:
            package = packages.pop()
            package.exports = None
            packages += [module for module in package.modules.values() if not module.is_alias]
