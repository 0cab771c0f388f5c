"""Scores of the unedited model, kept across runs: a sweep over configurations measures "before" once.

They depend on the weights and the tokens alone. SQLite keeps them in one file that several runs may share; each set of
scores is entered whole or not at all, so a run that is killed and resumed finds the same ones.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from editlab import ranks
from editlab.errors import EditLabError
from editlab.lm.cache import cache_dir

Request = tuple[tuple[int, ...], int]
"""Token ids of a prompt with its continuation, and the index of the continuation's first token."""

Score = tuple[float, bool]
"""Mean log-probability of the continuation's tokens, in nats, and whether each of them is the argmax."""

_AT_ONCE = 500
"""Keys a query: SQLite allows at least 999 parameters."""


class ScoreCache:
    """Scores by token ids, in the cache folder.

    Args:
        fingerprint: of the weights that score.
        products: type of the matrix products that they are found with.
    """

    def __init__(self, fingerprint: str, products: str = "float32") -> None:
        name = fingerprint[:32] + ("" if products == "float32" else f"-{products}")
        self.path = cache_dir() / "scores" / f"{name}.sqlite"

    def fetch(
        self, requests: Sequence[Request], find: Callable[[Sequence[Request]], Sequence[Score]]
    ) -> dict[Request, Score]:
        """The scores of all requests: read where they are known, found and kept where they are not.

        Of several ranks the first one alone touches the file.

        Raises:
            EditLabError: where the file can not be read or written.
        """
        keys = {request: _key(request) for request in dict.fromkeys(requests)}
        known = ranks.on_first(lambda: self._read(list(keys.values())))
        missing = [request for request, key in keys.items() if key not in known]
        if missing:
            found = {keys[r]: score for r, score in zip(missing, find(missing), strict=True)}
            ranks.on_first(lambda: self._keep(found))
            known |= found
        return {request: known[key] for request, key in keys.items()}

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60)) as database, database:  # one transaction
                database.execute("CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, logp REAL, hit INTEGER)")
                yield database
        except sqlite3.Error as error:
            raise EditLabError(f"{self.path} can not be used ({error}): delete it, or set EDITLAB_CACHE.") from error

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, Score]:
        known: dict[bytes, Score] = {}
        with self._open() as database:
            for start in range(0, len(keys), _AT_ONCE):
                some = keys[start : start + _AT_ONCE]
                query = f"SELECT key, logp, hit FROM scores WHERE key IN ({','.join('?' * len(some))})"
                known |= {key: (logp, bool(hit)) for key, logp, hit in database.execute(query, some)}
        return known

    def _keep(self, found: dict[bytes, Score]) -> None:
        with self._open() as database:
            # SQLite has no word for what is no number; it is found anew.
            rows = [(key, logp, int(hit)) for key, (logp, hit) in found.items() if math.isfinite(logp)]
            database.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", rows)


def _key(request: Request) -> bytes:
    ids, start = request
    return hashlib.sha256(repr((start, *ids)).encode()).digest()[:16]
