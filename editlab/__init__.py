"""Sequential knowledge editing of causal language models, as Lightning training."""

from typing import TYPE_CHECKING, Any

from editlab.utils.version import __version__

if TYPE_CHECKING:
    from editlab.api import EditResult, edit_model

__all__ = ["EditResult", "__version__", "edit_model"]


def __getattr__(name: str) -> Any:
    """Loads :mod:`editlab.api`, and with it torch and Lightning, at the first use of one of its names."""
    if name in ("EditResult", "edit_model"):
        import editlab.api

        return getattr(editlab.api, name)
    raise AttributeError(f"module 'editlab' has no attribute {name!r}")
