"""Pushing an exported model or delta to a repository on the Hugging Face hub, in one commit."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub import errors as hub
from huggingface_hub.utils import HFValidationError, validate_repo_id

from editlab.errors import EditLabError, UserError, causes
from editlab.lm.gguf.export import FILE as GGUF
from editlab.runs.delta import FILE as DELTA
from editlab.runs.model_card import PLACE, TAGS

log = logging.getLogger(__name__)

CARD = "README.md"
_RUN = ("checkpoints", "summary.json", "config.yaml")
"""Entries that a run's folder has, of which an export has none."""
_PUSHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", GGUF, CARD)
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class Export:
    """A folder that ``editlab export``, ``apply`` or ``revert`` wrote."""

    folder: Path
    names: tuple[str, ...]
    """names of the files that are pushed"""
    left: tuple[str, ...]
    """names of files of the user's own, which are not"""

    @classmethod
    def of(cls, folder: Path) -> Export:
        """Find the files of an export.

        Raises:
            UserError: The folder does not exist, is a run's, or is no complete export.
        """
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}: give one that editlab export has written.")
        found = sorted(path.name for path in folder.iterdir())
        if any(name in found for name in _RUN):
            raise UserError(
                f"{folder} is a run's folder, whose checkpoints hold only updates: export it first, by `editlab export "
                f"--ckpt_path {folder} --out edited`, and push edited."
            )
        names = [name for name in found if (folder / name).is_file() and any(fnmatch(name, kind) for kind in _PUSHED)]
        whole = "config.json" in names and any(fnmatch(name, "*.safetensors") for name in names)
        if not (whole or GGUF in names or DELTA in names):
            raise UserError(f"{folder} holds no model and no delta: give a folder that editlab export has written.")
        card = folder / CARD
        if not card.is_file() or TAGS not in card.read_text(encoding="utf-8", errors="replace"):
            raise UserError(
                f"{folder} has no model card of editlab's ({CARD}), which names the edits: export it again."
            )
        return cls(folder, tuple(names), tuple(name for name in found if name not in names))

    def operations(self, repo: str) -> list[CommitOperationAdd]:
        """The files to add to a repository; the card names it in place of the folder."""
        added = []
        for name in self.names:
            content: str | bytes = str(self.folder / name)
            if name == CARD:
                content = (self.folder / name).read_text(encoding="utf-8").replace(PLACE, repo).encode()
            added.append(CommitOperationAdd(name, content))
        return added


def push(export: Export, repo: str, private: bool = False, message: str = "Edited by editlab") -> str:
    """Upload an export to a model repository, which is created if there is none; nothing is uploaded in part.

    Args:
        export: the folder.
        repo: name of the repository, such as ``me/my-model``; without an owner it is the user's own.
        private: create it so that only its owner sees it.
        message: message of the commit.

    Returns:
        The address of the repository.

    Raises:
        UserError: The name is no name of a repository; there is no token, or it may not write there; the repository is
            public and ``private`` is set; or it holds other weights.
        EditLabError: The hub cannot be reached, or refuses the upload.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository on the hub: give one such as me/my-model.") from error
    if not get_token():
        raise UserError("There is no token of the hub: log in with `hf auth login`, or set HF_TOKEN.")
    api = HfApi(library_name="editlab")
    with _explained(repo):
        created = api.create_repo(repo, private=True if private else None, exist_ok=True)
        name = created.repo_id
        if private and not api.repo_info(name).private:
            raise UserError(f"{name} exists and is public: make it private on the hub first, or name another one.")
        _require_no_other_weights(api, name, export)
        if export.left:
            log.warning("%s: not pushed, as they are no part of an export: %s", export.folder, ", ".join(export.left))
        commit = api.create_commit(name, export.operations(name), commit_message=message)
    return str(commit.repo_url)


def _require_no_other_weights(api: HfApi, repo: str, export: Export) -> None:
    """Refuse a repository with weights in other files than those that are pushed: transformers might load them."""
    if "config.json" not in export.names:
        return
    there = [name for name in api.list_repo_files(repo) if any(fnmatch(name, kind) for kind in _WEIGHTS)]
    other = sorted(name for name in there if name not in export.names and name != DELTA and "/" not in name)
    if other:
        raise UserError(
            f"{repo} holds {other[0]} of another model or of other shards, which might be loaded in place of this "
            "one: delete it on the hub first, or name another repository."
        )


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Replace errors of the hub by one sentence."""
    try:
        yield
    except EditLabError:
        raise
    except Exception as error:
        for link in causes(error):
            if isinstance(link, hub.OfflineModeIsEnabled):
                raise EditLabError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it.") from error
            status = getattr(getattr(link, "response", None), "status_code", None)
            if status in (401, 403):
                raise UserError(
                    f"The hub does not let this token write to {repo}: log in with `hf auth login` and a token that "
                    "may write, or name a repository of your own."
                ) from error
            if isinstance(link, hub.HfHubHTTPError):
                first = (str(link).strip() or type(link).__name__).splitlines()[0].rstrip(".")
                raise EditLabError(f"The hub refused the upload to {repo} ({first}): try again later.") from error
            if isinstance(link, OSError) and not isinstance(link, FileNotFoundError):
                raise EditLabError(f"The hub cannot be reached to push {repo}: connect, and try again.") from error
            if type(link).__module__.partition(".")[0] in ("httpx", "httpcore", "requests", "urllib3"):
                raise EditLabError(f"The hub cannot be reached to push {repo}: connect, and try again.") from error
        raise


def size_of(export: Export) -> str:
    """The size of the files that are pushed, such as ``12.3 MB``."""
    return f"{sum(os.path.getsize(export.folder / name) for name in export.names) / 1e6:.1f} MB"
