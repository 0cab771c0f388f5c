"""Scores of the unedited model, kept across runs: a sweep over configurations measures "before" once.

They depend on the model and the tokens alone. SQLite keeps them in one file that several runs may share; each set of
scores is entered whole or not at all, so a run that is killed and resumed finds the same ones.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from editlab.distributed import ranks
from editlab.errors import EditLabError
from editlab.lm.precision import cast_to
from editlab.utils.files import cache_dir

Request = tuple[tuple[int, ...], int]
"""Token ids of a prompt with its continuation, and the index of the continuation's first token."""

Score = tuple[float, bool]
"""Mean log-probability of the continuation's tokens, in nats, and whether each of them is the argmax."""

CPU = torch.device("cpu")

_AT_ONCE = 500
"""Keys a query: SQLite allows at least 999 parameters."""


class ScoreCache:
    """Scores by token ids, in the cache folder.

    Args:
        key: of the model that scores (:func:`editlab.lm.fingerprint.model_key`).
        products: type of the matrix products that they are found with.
        device: where they are found. What autocast is in force there is looked at with each :meth:`fetch`, since a
            Trainer turns it on for its steps alone.
    """

    def __init__(self, key: str, products: str = "float32", device: torch.device = CPU) -> None:
        name = key[:32] + ("" if products == "float32" else f"-{products}")
        self.path = cache_dir() / "scores" / f"{name}.sqlite"
        self.device = device

    def fetch(
        self, requests: Sequence[Request], find: Callable[[Sequence[Request]], Sequence[Score]]
    ) -> dict[Request, Score]:
        """The scores of all requests: read where they are known, found and kept where they are not.

        Of several ranks the first one alone touches the file.

        Raises:
            EditLabError: where the file can not be read or written.
        """
        path, cast = self.path, cast_to(self.device)
        if cast:
            path = path.with_name(f"{path.stem}-autocast-{cast}.sqlite")
        keys = {request: _key(request) for request in dict.fromkeys(requests)}
        known = ranks.on_first(lambda: _read(path, list(keys.values())))
        missing = [request for request, key in keys.items() if key not in known]
        if missing:
            found = {keys[r]: score for r, score in zip(missing, find(missing), strict=True)}
            ranks.on_first(lambda: _keep(path, found))
            known |= found
        return {request: known[key] for request, key in keys.items()}


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as database, database:  # one transaction
            database.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, logp REAL, hit INTEGER)")
            yield database
    except sqlite3.DatabaseError as error:
        full = getattr(error, "sqlite_errorname", "") == "SQLITE_FULL" or "disk is full" in str(error)
        mend = "free space there" if full else "delete it"
        raise EditLabError(f"{path} can not be used ({error}): {mend}, or set EDITLAB_CACHE.") from error


def _read(path: Path, keys: Sequence[bytes]) -> dict[bytes, Score]:
    known: dict[bytes, Score] = {}
    with _open(path) as database:
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            query = f"SELECT key, logp, hit FROM scores WHERE key IN ({','.join('?' * len(some))})"
            known |= {key: (logp, bool(hit)) for key, logp, hit in database.execute(query, some)}
    return known


def _keep(path: Path, found: dict[bytes, Score]) -> None:
    with _open(path) as database:
        # SQLite has no word for what is no number; it is found anew.
        rows = [(key, logp, int(hit)) for key, (logp, hit) in found.items() if math.isfinite(logp)]
        database.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows)


def _key(request: Request) -> bytes:
    ids, start = request
    return hashlib.sha256(repr((start, *ids)).encode()).digest()[:16]
