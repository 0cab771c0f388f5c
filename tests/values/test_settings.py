"""Settings of the search that are about Adam: its falling step size, its decay rates, and the key of a cache."""

import math

import pytest

from editlab.errors import UserError
from editlab.values.settings import PUBLISHED_SEARCH, ValueSettings


def test_step_sizes_fall_linearly_to_a_fraction():
    # Five evaluations have four updates: 2, 1.5, 1, and at last a quarter of 2.
    settings = ValueSettings(steps=5, lr=2.0, lr_end=0.25)
    assert [settings.step_size_of(update) for update in range(4)] == [2.0, 1.5, 1.0, 0.5]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_search_of_one_update_takes_the_first_step_size(steps):
    assert ValueSettings(steps=steps, lr=2.0, lr_end=0.25).step_size_of(0) == 2.0


def test_the_published_step_size_does_not_fall():
    assert {ValueSettings(**PUBLISHED_SEARCH).step_size_of(update) for update in range(24)} == {0.5}


def test_the_published_search_of_older_versions_keeps_its_key_of_a_cache():
    assert not {"lr_end", "betas", "contexts_a_step"} & set(ValueSettings(**PUBLISHED_SEARCH).cache_key())
    key = ValueSettings(lr_end=0.1, betas=(0.5, 0.9)).cache_key()
    assert (key["lr_end"], key["betas"]) == (0.1, (0.5, 0.9))


def test_decay_rates_may_come_as_a_list():
    assert ValueSettings(betas=[0.5, 0]).betas == (0.5, 0.0)  # type: ignore[arg-type]
    assert ValueSettings(betas=[0.5, 0.9]).cache_key() == ValueSettings().cache_key()  # type: ignore[arg-type]


@pytest.mark.parametrize("lr_end", [0, -0.5, 1.5, math.nan])
def test_an_end_that_is_no_fraction_is_refused(lr_end):
    with pytest.raises(UserError, match=r"model\.values\.lr_end is .*: it must be above 0 and at most 1"):
        ValueSettings(lr_end=lr_end)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), (1.0, 0.9), (0.9, -0.1), (0.9, math.nan), ()])
def test_decay_rates_that_are_no_pair_below_one_are_refused(betas):
    with pytest.raises(UserError, match=r"model\.values\.betas is \[.*\]: it must be two numbers"):
        ValueSettings(betas=betas)


@pytest.mark.parametrize("changed", [{"lr_end": 0.5}, {"betas": (0.6, 0.9)}, {"contexts_a_step": 3}])
def test_the_gradient_source_has_no_adam(changed):
    with pytest.raises(UserError, match=rf"model\.values\.{next(iter(changed))} has no meaning"):
        ValueSettings(source="gradient", **changed)
