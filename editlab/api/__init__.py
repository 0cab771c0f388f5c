"""Editing a loaded model in one call from Python, without recipes or a Trainer, and reading what came of it."""

from editlab.api.edit import RECOMMENDED, edit_model
from editlab.api.result import EditResult

__all__ = ["RECOMMENDED", "EditResult", "edit_model"]
