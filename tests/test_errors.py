"""Chains of errors, which may be cycles."""

import pytest

from editlab.cli.failures import describe
from editlab.cli.main import main
from editlab.errors import causes


def cycle(length):
    """An error whose chain of causes and contexts comes back to it after ``length`` links."""
    errors = [ValueError(str(number)) for number in range(length)]
    for number, error in enumerate(errors):
        following = errors[(number + 1) % length]
        if number % 2:
            error.__cause__ = following
        else:
            error.__context__ = following
    return errors[0]


@pytest.mark.parametrize("length", [2, 3, 10])
def test_a_cycle_of_errors_is_walked_once(length):
    assert [str(error) for error in causes(cycle(length))] == [str(number) for number in range(length)]


def test_the_command_ends_with_a_cycle_of_errors(monkeypatch, capsys):
    error = cycle(3)

    def fail(arguments):
        raise error

    assert describe(error) is None
    monkeypatch.setattr("editlab.cli.main.run", fail)
    assert main(["fit"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
