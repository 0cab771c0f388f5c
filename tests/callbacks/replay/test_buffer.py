"""The replay buffer against plain-list oracles, chi-square tests of its draws, and saving and loading its state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from callbacks.replay.buffer import EVICTION, SAMPLING, Memory, ReplayBuffer
from editlab.data.fact import Fact
from editlab.errors import UserError

SAMPLINGS, EVICTIONS = sorted(SAMPLING), sorted(EVICTION)


def memory(subject, step=0, importance=0.0):
    tensors = torch.tensor([float(step)]), torch.zeros(2), torch.ones(1)
    return Memory(Fact(str(subject), "{} is", "x"), *tensors, step, importance=importance)


def filled(count, capacity=None, **policies):
    buffer = ReplayBuffer(capacity or count, **policies)
    for i in range(count):
        buffer.add(memory(i, i, importance=float(i)))
    return buffer


def steps(memories):
    return [m.step for m in memories]


def chi_square(counts, expected):
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    subjects=st.lists(st.integers(0, 8), max_size=30),
    capacity=st.integers(1, 6),
    sampling=st.sampled_from(SAMPLINGS),
    eviction=st.sampled_from(EVICTIONS),
    seed=st.integers(0, 3),
)
def test_properties_of_every_policy(subjects, capacity, sampling, eviction, seed):
    def run():
        buffer, drawn = ReplayBuffer(capacity, sampling, eviction, seed), []
        for step, subject in enumerate(subjects):
            buffer.add(memory(subject, step, importance=float(subject)))
            sample = buffer.sample(2, step=step)
            assert len(sample) == min(2, len(buffer))
            assert steps(sample) == sorted(set(steps(sample)))
            assert all(m.replayed == step for m in sample)
            drawn.append(steps(sample))
        return buffer, drawn

    buffer, drawn = run()
    memories = buffer.memories
    assert len(memories) <= capacity
    assert len({m.fact.slot for m in memories}) == len(memories)
    assert steps(memories) == sorted(steps(memories))
    # The newest of each subject that is there is the one that came last, never one it replaced.
    latest = {str(subject): step for step, subject in enumerate(subjects)}
    assert all(m.step == latest[m.fact.subject] for m in memories)
    again, redrawn = run()
    assert redrawn == drawn
    # The state goes round at any point, and both go on alike.
    other = ReplayBuffer(capacity, sampling, eviction, seed + 1)
    other.load_state_dict(buffer.state_dict())
    for step in range(100, 104):
        assert steps(other.sample(3)) == steps(again.sample(3))
        other.add(memory(step, step))
        again.add(memory(step, step))
        assert steps(other.memories) == steps(again.memories)


@settings(max_examples=50, deadline=None)
@given(subjects=st.lists(st.integers(0, 8), max_size=30), capacity=st.integers(1, 6))
def test_first_in_first_out_with_replacement(subjects, capacity):
    # The oracle is a plain list: a repeated subject leaves its old place, and the oldest leave when it is too long.
    buffer, oracle = ReplayBuffer(capacity), []
    for step, subject in enumerate(subjects):
        buffer.add(memory(subject, step))
        oracle = [*((s, t) for s, t in oracle if s != str(subject)), (str(subject), step)][-capacity:]
    assert [(m.fact.subject, m.step) for m in buffer.memories] == oracle


def test_the_longest_not_replayed_leaves_first():
    buffer = ReplayBuffer(3, sampling="oldest", eviction="lru")
    for i in range(3):
        buffer.add(memory(i, i))
    buffer.sample(2, step=3)  # 0 and 1 are replayed in batch 3; 2 was last touched when it came
    buffer.add(memory(3, 4))
    assert steps(buffer.memories) == [0, 1, 4]


def test_the_least_important_leaves_first_but_no_newcomer():
    """A batch of newcomers, whose importance is not measured yet, replaces the old ones that drifted least."""
    buffer = ReplayBuffer(4, eviction="least_important")
    for number, importance in enumerate((3.0, 1.0, 2.0, 4.0)):
        buffer.add(memory(number, number, importance))
    for known in buffer.memories:
        known.weighed = True
    for number in (4, 5, 6):
        buffer.add(memory(number, number))
    assert steps(buffer.memories) == [3, 4, 5, 6]
    alone = ReplayBuffer(1, eviction="least_important")
    alone.add(memory(0, 0))
    alone.add(memory(1, 1))
    assert steps(alone.memories) == [1]


def test_fixed_orders():
    assert steps(filled(6, sampling="recent").sample(2)) == [4, 5]
    assert steps(filled(6, sampling="oldest").sample(2)) == [0, 1]
    assert steps(filled(6, sampling="loss").sample(2)) == [4, 5]  # importance is the number here
    assert filled(6).sample(0) == []
    assert ReplayBuffer(3).sample(5) == []


def test_samples_spare_what_is_being_replaced_and_the_global_generator():
    busy = [memory(3).fact, memory(4).fact]
    assert not {3, 4} & set(steps(filled(20).sample(99, exclude=busy)))
    state = torch.get_rng_state()
    filled(20).sample(5)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_draws_every_memory_equally_often():
    # 2000 draws of 2 of 10: each is expected 400 times; the chi-square statistic's 99.9% point at 9 degrees is 27.9.
    buffer, counts = filled(10, seed=5), [0] * 10
    for _ in range(2000):
        for m in buffer.sample(2):
            counts[m.step] += 1
    assert chi_square(counts, [400] * 10) < 27.9


def test_priority_draws_in_proportion_to_importance():
    # One of the importances 0 to 4 at a time: probabilities 0, .1, .2, .3, .4; 99.9% point at 3 degrees is 16.3.
    buffer, counts = filled(5, sampling="priority", seed=2), [0] * 5
    for _ in range(3000):
        counts[buffer.sample(1)[0].step] += 1
    assert counts[0] == 0
    assert chi_square(counts[1:], [300, 600, 900, 1200]) < 16.3
    # All of them unimportant: still some are drawn.
    for m in buffer.memories:
        m.importance = 0.0
    assert len(buffer.sample(3)) == 3


def test_the_reservoir_holds_all_of_history_equally_likely():
    # 1500 buffers of 3 after 10 edits: each edit is in with probability .3, 450 times; 99.9% point at 9 degrees, 27.9.
    # (Edits of one buffer are not independent, which makes the statistic smaller than chi-square, not larger.)
    counts = [0] * 10
    for seed in range(1500):
        for m in filled(10, capacity=3, eviction="reservoir", seed=seed).memories:
            counts[m.step] += 1
    assert chi_square(counts, [450] * 10) < 27.9


def test_state_survives_a_file_and_sizes_add_up(tmp_path):
    buffer = ReplayBuffer(5, seed=3)
    for i in [*range(7), 5]:
        buffer.add(memory(i, i))
    buffer.memories[0].context_keys = torch.ones(2, 2)
    torch.save(buffer.state_dict(), tmp_path / "state")
    other = ReplayBuffer(5)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))  # what Lightning loads it with
    assert [m.fact for m in other.memories] == [m.fact for m in buffer.memories]
    assert (other.replaced, other.seen) == (buffer.replaced, buffer.seen) == (1, 7)
    # By hand: 5 memories of 1 + 2 + 1 float32 numbers, and 2 x 2 more.
    assert other.size == buffer.size == (5 * 4 + 4) * 4
    assert torch.equal(other.memories[0].context_keys, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, "capacity is 0"),
        ({"capacity": 1, "sampling": "newest"}, "sampling is 'newest': it must be one of random, recent"),
        ({"capacity": 1, "eviction": "lifo"}, "eviction is 'lifo': it must be one of fifo, lru"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        ReplayBuffer(**arguments)


def test_a_newcomer_was_last_replayed_when_it_came():
    assert memory(0, step=7).replayed == 7
    assert math.isclose(memory(0, importance=0.5).importance, 0.5)
