"""Past keys in the metric: sums written out by hand, and the state to the bit."""

import pytest
import torch

from callbacks.replay.past_keys import PastKeys
from editlab.errors import UserError


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_sum_by_hand():
    past = PastKeys(weight=2.0, forget=0.5)
    first, second, other = draw(4, 2), draw(4, 3, seed=1), draw(4, 1, seed=2)
    past.add(6, first, other, 0.1)
    past.add(6, second, other[:, :0], 0.1)
    expected = 0.5 * (2 * first @ first.T + 0.1 * other @ other.T) + 2 * second @ second.T
    assert torch.allclose(past.moments[6], expected, rtol=1e-12)
    # The first batch is one batch old: what is left of its first key is 0.5 of it.
    past.remove(6, first[:, :1], torch.tensor([1]))
    assert torch.allclose(past.moments[6], expected - 0.5 * 2 * first[:, :1] @ first[:, :1].T, rtol=1e-6, atol=1e-8)
    past.remove(5, first[:, :1], torch.tensor([0]))  # a layer that remembers nothing
    assert list(past.moments) == [6]


@pytest.mark.parametrize("moved", [0.0, 1e-3, 0.1, 3.0])
def test_removed_keys_leave_the_sum_positive_semidefinite(moved):
    # 5 keys in 33 dimensions: one that has moved lies outside of what the others span.
    past = PastKeys(2.0)
    keys = draw(33, 5, seed=1)
    past.add(6, keys, keys[:, :0], 0.0)
    before = past.moments[6]
    past.remove(6, keys[:, :1] + moved * draw(33, 1, seed=2), torch.tensor([0]))
    left = past.moments[6]
    largest = float(torch.linalg.eigvalsh(before)[-1])
    assert float(torch.linalg.eigvalsh(left)[0]) > -1e-9 * largest
    assert float(torch.linalg.eigvalsh(before - left)[0]) > -1e-9 * largest  # nothing is put in either
    if moved == 0:
        assert torch.allclose(left, 2 * keys[:, 1:] @ keys[:, 1:].T, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("others", [0, 100])
def test_several_keys_that_have_moved_may_go_at_once(others):
    # Each takes the direction that it can, and what is left has none that is negative, time and again.
    past, keys = PastKeys(1.0), draw(64, 16, seed=4)
    past.add(6, keys, draw(64, others, seed=5), 0.1)
    largest = float(torch.linalg.eigvalsh(past.moments[6])[-1])
    for time in range(3):
        some = keys[:, 4 * time : 4 * time + 4] + 0.05 * draw(64, 4, seed=6 + time)
        before = past.moments[6]
        past.remove(6, some, torch.zeros(4))
        assert float(torch.linalg.eigvalsh(past.moments[6])[0]) > -1e-12 * largest
        assert float(torch.linalg.eigvalsh(before - past.moments[6])[0]) > -1e-12 * largest


def test_keys_that_have_not_moved_go_whole_also_several_at_once():
    past, keys = PastKeys(2.0, forget=0.5), draw(33, 5, seed=1)
    past.add(6, keys[:, :2], keys[:, :0], 0.0)
    past.add(6, keys[:, 2:], keys[:, :0], 0.0)
    past.remove(6, keys[:, [0, 2, 3]], torch.tensor([1, 0, 0]))
    expected = 0.5 * 2 * keys[:, 1:2] @ keys[:, 1:2].T + 2 * keys[:, 4:] @ keys[:, 4:].T
    assert torch.allclose(past.moments[6], expected, atol=1e-11 * float(expected.abs().max()))


def test_the_only_key_may_be_taken_out_twice():
    past, key = PastKeys(1.0), draw(9, 1, seed=3)
    past.add(6, key, key[:, :0], 0.0)
    for _ in range(2):
        past.remove(6, key, torch.tensor([0]))
        assert past.moments[6].abs().max() < 1e-6 * float(key.square().sum())


def test_the_state_is_half_the_matrix_and_goes_round_to_the_bit(tmp_path):
    past = PastKeys(1.0)
    for seed in range(5):
        past.add(3, draw(33, 7, seed=seed), draw(33, 2, seed=seed + 9), 0.3)
    torch.save(past.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    assert state[3].numel() == 33 * 34 // 2
    other = PastKeys(1.0)
    other.load_state_dict(state)
    assert torch.equal(other.moments[3], past.moments[3])


@pytest.mark.parametrize("arguments", [{"weight": 0.0}, {"weight": 1.0, "forget": 0.0}, {"weight": 1.0, "forget": 1.1}])
def test_bad_settings(arguments):
    with pytest.raises(UserError, match="must be above 0"):
        PastKeys(**arguments)
