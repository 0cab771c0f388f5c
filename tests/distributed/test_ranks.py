"""Tests that each function gives every rank the result of a single process, and that errors reach all ranks."""

from functools import partial

import pytest
import torch

import editlab.keys.moments
import editlab.lm.language_model
from editlab.distributed import ranks
from editlab.errors import EditLabError, UserError
from editlab.evaluation.scoring import score_pairs
from editlab.keys.subject_keys import Site, read_keys, read_outputs
from editlab.lm.language_model import LanguageModel
from editlab.lm.memory import by_halves
from editlab.lm.text import WINDOW, sample_text
from editlab.values.anchor import parts_of
from editlab.values.gradient import read_gradients
from editlab.values.optimize import ValueSettings, optimize_values
from editlab.values.spread import carry_forward
from tests.facts import FACTS
from tests.ranked import together
from tests.tiny import tiny_model, tiny_tokenizer

GROUPS = [[4, 0], [1], [2, 6, 3], [5], [7]]


def squares(groups):
    """Return each item's square as a number and as a view of a tensor, and the items that this rank processed."""
    done = []

    def work(group):
        done.extend(group)
        both = torch.tensor([[i, i * i] for i in group], dtype=torch.float32)
        return [(i * i, row) for i, row in zip(group, both, strict=True)]

    return ranks.each(groups, work), done


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_gives_all_results_in_order_on_every_rank(count, tmp_path):
    results = together(count, tmp_path / "run", squares, GROUPS)
    for found, _ in results:
        assert [square for square, _ in found] == [i * i for i in range(8)]
        assert torch.equal(torch.stack([row for _, row in found])[:, 1], torch.arange(8).float() ** 2)
    assert [done for _, done in results] == [
        [i for group in GROUPS[rank::count] for i in group] for rank in range(count)
    ]


def test_fewer_groups_than_ranks(tmp_path):
    for groups in ([[0, 1]], []):
        for found, _ in together(3, tmp_path / f"run_{len(groups)}", squares, groups):
            assert [square for square, _ in found] == [0, 1][: 2 * len(groups)]


def other_functions():
    number = ranks.number()
    summed = ranks.summed(range(2), lambda subset: [torch.tensor([float(sum(subset)), len(subset)])])
    return {
        "number": number,
        "summed": summed[0],
        "on_first": ranks.on_first(lambda: ("rank", ranks.number())),
        "ahead": ranks.first_ahead(lambda: ranks.number()),
        "broadcast": ranks.broadcast(torch.full((2, 3), float(number)).T),
        "read": ranks.read_on_first(lambda: torch.full((2,), 7.0 + number), (2,), torch.float32),
    }


@pytest.mark.parametrize("count", [1, 3])
def test_the_other_functions_give_the_same_on_every_rank(count, tmp_path):
    for number, found in enumerate(together(count, tmp_path / "run", other_functions)):
        assert found["number"] == number
        assert found["summed"].tolist() == [1.0, 2.0]  # sum 0 + 1 and two parts; the third rank has no part
        assert found["on_first"] == ("rank", 0)
        assert found["ahead"] == number
        assert torch.equal(found["broadcast"], torch.zeros(3, 2))
        assert found["read"].tolist() == [7.0, 7.0]


def failing(error, at):
    def work(group):
        if ranks.number() == at:
            raise error
        return group

    ranks.each([[0], [1], [2]], work)


def test_an_error_on_one_rank_is_raised_on_all_ranks(tmp_path):
    for error in together(3, tmp_path / "user", failing, UserError("The facts are bad: fix them."), 1):
        assert type(error) is UserError
        assert str(error) == "The facts are bad: fix them."
    first, second, third = together(3, tmp_path / "other", failing, KeyError("x"), 1)
    assert isinstance(second, KeyError)  # the failing rank raises the original error, with its traceback
    for error in (first, third):
        assert type(error) is EditLabError
        assert str(error) == "Rank 1 failed with KeyError: 'x'"


def failing_outside(at):
    if ranks.number() == at:
        error = UserError("The disk is gone.")
        received = ranks.notify(error)
        return received, ranks.reached_all(error), ranks.notify(error)
    return ranks.each(GROUPS, lambda group: group)


def test_an_error_outside_of_a_call_is_raised_in_the_next_call(tmp_path):
    raised, received = together(2, tmp_path / "run", failing_outside, 1)
    assert type(raised) is UserError
    assert str(raised) == "The disk is gone."
    assert received == (True, True, True)


def failing_alone():
    ranks.PATIENCE = 0.5
    return ranks.notify(UserError("No other rank receives this.")) if ranks.number() else ranks.count()


def test_a_rank_does_not_wait_forever_until_its_error_is_received(tmp_path):
    assert together(2, tmp_path / "run", failing_alone) == [2, False]


def different_calls():
    return ranks.on_first(lambda: 1) if ranks.number() else ranks.each([[0]], lambda group: group)


def test_different_calls_on_the_ranks_raise_an_error(tmp_path):
    for error in together(2, tmp_path / "run", different_calls):
        assert type(error) is EditLabError
        assert "each different_calls" in str(error)
        assert "on_first different_calls" in str(error)
        assert "a callback must do the same on every rank" in str(error)


def test_one_process_needs_no_group():
    assert (ranks.number(), ranks.count()) == (0, 1)
    assert ranks.notify(UserError("x"))
    with pytest.raises(KeyError):
        ranks.each([[0]], lambda group: {}[0])


def measure(facts):
    """Compute values, keys, scores and moments in passes so small that several ranks get some."""
    editlab.lm.language_model.TOKENS_A_PASS = 24
    editlab.keys.moments.ROWS = 1
    lm = LanguageModel(tiny_model("llama"), tiny_tokenizer())
    site, contexts = Site.of(lm, 2), ["", "Oslo lies in Norway. "]
    values = optimize_values(lm, facts, site, contexts, ValueSettings(steps=4, batch_tokens=30, matmul="float32"))
    keys = read_keys(lm, facts, 1, site, contexts, "mean")
    carried = carry_forward(lm, facts, Site.of(lm, 0), values.target, [Site.of(lm, 1), site])
    scores = score_pairs(lm, [(f.question, f.target_new) for f in facts])
    windows = sample_text(lm, 3 * WINDOW + 40, 0, "")
    moments = editlab.keys.moments.accumulate(lm, [1], windows)[1]
    gradients = read_gradients(lm, facts, site, ValueSettings(source="gradient", batch_tokens=8, matmul="float32"))
    exact = [values.target, values.loss, values.steps, keys.keys, keys.current, keys.context_keys, keys.fact]
    exact += [*carried.values(), read_outputs(lm, facts, [site]), *scores]
    exact += [*gradients, parts_of(lm, facts, site, values.target)]
    return exact, windows, moments


@pytest.mark.parametrize(("count", "facts"), [(2, 5), (3, 1)])  # uneven division; fewer facts than ranks
def test_divided_work_gives_the_results_of_one_process(count, facts, tmp_path):
    ((exact, windows, moments),) = together(1, tmp_path / "one", measure, FACTS[:facts])
    several = together(count, tmp_path / "several", measure, FACTS[:facts])
    for found in several:
        assert all(torch.equal(a, b) for a, b in zip(exact, found[0], strict=True))
        assert found[1] == windows
        # The float64 sums are taken in another order, which changes each term by 1e-16.
        assert torch.allclose(found[2], moments, rtol=1e-12, atol=1e-14)
        assert torch.equal(found[2], several[0][2])


def test_the_name_of_a_call_includes_the_work_inside_a_partial():
    def other(group):
        return group

    assert ranks._name(partial(by_halves, other)).startswith("by_halves(test_the_name_of_a_call")
    assert ranks._name(partial(by_halves, other)) != ranks._name(partial(by_halves, squares))
    assert ranks._name(partial(squares, GROUPS)) == "squares()"
