"""The training of an adjustment: that it lowers the loss, and that a killed one resumes to the same weights."""

import random
from contextlib import suppress

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.lora import training
from callbacks.lora.guard import examine
from callbacks.lora.objective import distributions, divergence
from callbacks.lora.training import Deck, Training, Unfinished
from editlab.lm.language_model import LanguageModel
from tests.callbacks.lora.test_objective import objective
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def lm():
    return LanguageModel(tiny_model("llama").requires_grad_(False), tiny_tokenizer())


@pytest.mark.parametrize("packs", [False, True])
def test_training_learns_the_edits_and_divergence_holds_it_back(lm, packs):
    lm.packs = packs
    module = lm.anatomy.edit_module(2)
    original = module.weight.detach().clone()
    learnt = {}
    for weight in (0.0, 30.0):
        module.weight.requires_grad_(True)
        aim = objective(lm, {"edits": 1.0, "before": weight, "unedited": 0.0})
        start = examine(lm, FACTS[:4], []).edits
        optimizer = torch.optim.AdamW([module.weight], lr=3e-3, weight_decay=0.0)
        losses = Training(30, 3e-3, 4).run(lm, aim, optimizer, random.Random(0))
        module.weight.requires_grad_(False)
        said = torch.cat(distributions(lm, aim.other_rows))
        learnt[weight] = examine(lm, FACTS[:4], []).edits - start, float(divergence(torch.cat(list(aim.before)), said))
        assert losses["edits"] < -start
        with torch.no_grad():
            module.weight.copy_(original)
    assert learnt[0.0][0] > learnt[30.0][0] > 0.1
    assert learnt[30.0][1] < learnt[0.0][1] / 3


def test_steps_get_shorter_to_the_end(lm):
    # SGD moves a weight by lr times its gradient: 1, 3/4, 2/4 and 1/4 of the first rate.
    bias = torch.nn.Parameter(torch.zeros(1))

    class Slope:
        edits, other_rows = [None], []

        def loss(self, lm, edits, others):
            return {"edits": bias.sum()}

        def total(self, parts):
            return parts["edits"]

    Training(4, 0.5, 1).run(lm, Slope(), torch.optim.SGD([bias], 99.0), random.Random(0))
    assert float(bias.detach()) == pytest.approx(-0.5 * (1 + 0.75 + 0.5 + 0.25))


def test_a_loss_that_is_not_finite_stops_it(lm):
    module = lm.anatomy.edit_module(2)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    module.weight.requires_grad_(True)
    aim = objective(lm, {"edits": 1.0, "before": 0.0, "unedited": 0.0})
    optimizer = torch.optim.AdamW([module.weight])
    with pytest.raises(FloatingPointError, match="the loss is nan after 0 steps"):
        Training(3, 1e-3, 4).run(lm, aim, optimizer, random.Random(0))


def test_a_deck_deals_all_before_any_comes_again():
    deck = Deck(5, random.Random(0))
    dealt = [i for _ in range(5) for i in deck.deal(2)]
    assert sorted(dealt[:5]) == sorted(dealt[5:]) == list(range(5))
    assert sorted(Deck(3, random.Random(0)).deal(16)) == [0, 1, 2]
    assert Deck(0, random.Random(0)).deal(4) == []
    for _ in range(20):
        hand = deck.deal(4)
        assert len(set(hand)) == 4


class KilledError(Exception):
    """An error that stands for a kill."""


def trained(lm, path, key="this", stop=None):
    """The weight after a training of eight steps whose state is saved at ``path``, killed after ``stop`` steps."""
    weight = torch.nn.Parameter(lm.anatomy.edit_module(2).weight.detach().clone())
    aim, calls = objective(lm, {"edits": 1.0, "before": 2.0, "unedited": 0.0}), []

    class Stopping:
        edits, other_rows, total = aim.edits, aim.other_rows, aim.total

        def loss(self, lm, edits, others):
            if len(calls) == stop:
                raise KilledError
            calls.append((edits, others))
            # Through the weight, and with a draw of torch's, as dropout makes one.
            noise = torch.rand(weight.shape)
            return {"edits": (weight * noise).square().sum() * (1 + sum(edits)), "before": weight.sum() * sum(others)}

    draw = random.Random(0)
    torch.manual_seed(0)
    with suppress(KilledError):
        Training(8, 1e-2, 2).run(lm, Stopping(), torch.optim.AdamW([weight]), draw, Unfinished(path, key))
    return weight.detach(), calls


def test_a_killed_training_resumes_to_the_same_bits(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SECONDS", 0.0)
    whole, steps = trained(lm, tmp_path / "whole.pt")
    path = tmp_path / "killed.pt"
    assert len(trained(lm, path, stop=3)[1]) == 3
    assert trained(lm, path, stop=2)[1] == steps[3:5]
    ended, rest = trained(lm, path)
    assert rest == steps[5:]
    assert torch.equal(ended, whole)
    # Once it is at its end there is nothing left to do.
    again, none = trained(lm, path)
    assert none == []
    assert torch.equal(again, whole)


def test_a_training_that_should_stop_saves_its_state_first(lm, tmp_path):
    class Slope:
        edits, other_rows, total = [None], [], staticmethod(lambda parts: parts["edits"])

        def loss(self, lm, edits, others):
            return {"edits": bias.sum()}

    def train(answers):
        bias.data.zero_()
        kept = Unfinished(tmp_path / "kept.pt", "this")
        optimizer = torch.optim.SGD([bias], 99.0)
        Training(4, 0.5, 1).run(lm, Slope(), optimizer, random.Random(0), kept, lambda: next(answers))

    bias = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(SIGTERMException):
        train(iter([False, False, True]))
    assert float(bias.detach()) == pytest.approx(-0.5 * (1 + 0.75 + 0.5))
    train(iter([False]))  # one step is left
    assert float(bias.detach()) == pytest.approx(-0.5 * (1 + 0.75 + 0.5 + 0.25))


def test_the_losses_are_those_of_the_whole_training(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SECONDS", 0.0)
    values = iter(range(1, 9))
    bias = torch.nn.Parameter(torch.zeros(1))

    class Counting:
        edits, other_rows = [None], []

        def loss(self, lm, edits, others):
            value = next(values)
            if value == 6:
                raise KilledError
            return {"edits": bias.sum() * 0 + value}

        def total(self, parts):
            return parts["edits"]

    def train():
        kept = Unfinished(tmp_path / "kept.pt", "this")
        return Training(7, 0.5, 1).run(lm, Counting(), torch.optim.SGD([bias], 1.0), random.Random(0), kept)

    with pytest.raises(KilledError):
        train()
    # 1 to 5, then 7 and 8: of the seven, the last quarter is one.
    assert train() == {"edits": 8.0}


def test_another_training_is_not_gone_on_with(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SECONDS", 0.0)
    trained(lm, tmp_path / "kept.pt", stop=3)
    assert len(trained(lm, tmp_path / "kept.pt", key="other")[1]) == 8


def test_a_damaged_file_is_reported_and_not_used(lm, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(training, "SECONDS", 0.0)
    path = tmp_path / "kept.pt"
    trained(lm, path, stop=3)
    path.write_bytes(path.read_bytes()[:100])
    assert len(trained(lm, path)[1]) == 8
    assert "kept.pt is damaged: the adjustment is trained from its start" in caplog.text


def test_a_short_training_is_not_written_down(lm, tmp_path):
    trained(lm, tmp_path / "kept.pt")
    assert not (tmp_path / "kept.pt").exists()


def test_a_batch_that_memory_does_not_hold_is_trained_on_in_pieces(lm, monkeypatch, caplog):
    module = lm.anatomy.edit_module(2)
    original = module.weight.detach().clone()
    aim = objective(lm, {"edits": 1.0, "before": 2.0, "unedited": 0.0})
    whole = aim.loss
    ends = []
    for rows_that_fit in (99, 2):

        def loss(lm, edits, others, most=rows_that_fit):
            if max(len(edits), len(others)) > most:
                raise RuntimeError("CUDA error: out of memory")
            return whole(lm, edits, others)

        monkeypatch.setattr(aim, "loss", loss)
        module.weight.requires_grad_(True)
        optimizer = torch.optim.SGD([module.weight], lr=1e-2)
        losses = Training(3, 1e-2, 4).run(lm, aim, optimizer, random.Random(0))
        module.weight.requires_grad_(False)
        ends.append((module.weight.detach() - original, losses))
        with torch.no_grad():
            module.weight.copy_(original)
    (at_once, losses), (in_pieces, the_same) = ends
    assert torch.allclose(at_once, in_pieces, rtol=1e-4, atol=1e-7)
    assert losses == pytest.approx(the_same, rel=1e-4, abs=1e-6)
    assert caplog.text.count("are processed in 2 pieces") == 1


def test_a_single_row_that_does_not_fit_is_an_error(lm, monkeypatch):
    aim = objective(lm, {"edits": 1.0, "before": 0.0, "unedited": 0.0})

    def loss(*arguments):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(aim, "loss", loss)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(RuntimeError, match="out of memory"):
        Training(1, 1.0, 4).run(lm, aim, optimizer, random.Random(0))
