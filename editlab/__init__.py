"""Sequential knowledge editing of causal language models, as Lightning training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from editlab.utils.version import __version__

if TYPE_CHECKING:
    from editlab.api import EditResult, edit_model
    from editlab.runs.run import Run

__all__ = ["EditResult", "Run", "__version__", "edit_model"]

_MODULES = {"EditResult": "editlab.api", "edit_model": "editlab.api", "Run": "editlab.runs.run"}
"""Name -> its module, which imports torch and Lightning."""


def __getattr__(name: str) -> Any:
    """Imports a name's module at the first use of the name."""
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'editlab' has no attribute {name!r}")
