"""The errors that a user sees: one sentence each, saying what is wrong and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator


class EditLabError(Exception):
    """A failure that is not the user's doing; the command line prints its one sentence and exits with 1."""

    exit_code = 1


class UserError(EditLabError):
    """A mistake in what was asked for (a path, a field, a layer); the command line exits with 2."""

    exit_code = 2


class NotFiniteError(EditLabError):
    """What a model says is NaN or infinite: edits have broken it, or its type is too narrow."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, the outermost first: libraries wrap what they are told in errors of their own."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
