"""The errors that a user sees: each is one sentence that says what is wrong and how to fix it."""

from __future__ import annotations

from collections.abc import Iterator


class EditLabError(Exception):
    """A failure that the user did not cause; the command line prints its sentence and exits with code 1."""

    exit_code = 1


class UserError(EditLabError):
    """A setting or input that the user can fix (a path, a field, a layer); the command line exits with code 2."""

    exit_code = 2


class NonFiniteError(EditLabError):
    """Numbers that a run cannot do without are NaN or infinite: edits broke the model, or its dtype is too narrow.

    It ends the run, unless whoever asked for the numbers can do without them.
    """


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and the errors that led to it, each once, the outermost first.

    Libraries wrap the errors of code that they call. The chain may be a cycle: if a writer stores its error and raises
    it again while the same error is being handled elsewhere, an error becomes the context of its own cause.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
