"""The edits that an adjustment may see, and the draws among them."""

import random
from types import SimpleNamespace

import pytest

import callbacks.lora.callback
from callbacks import LoRAAdjust, MemoryReplay
from callbacks.lora.draws import draw_edits, stored_edits
from editlab.data.fact import Fact
from editlab.errors import UserError
from tests.test_editor import editor, fit

EDITS = [Fact(name, "{} is", "here") for name in "abcdefgh"]
LORA = {"steps": 2, "rank": 2, "text_tokens": 128, "tolerance": 100.0, "every_n_batches": 2, "probes": 0}


def test_recent_edits_are_trained_on_and_earlier_ones_drawn():
    known = [(fact, fact in EDITS[6:]) for fact in EDITS]
    trained, held_out = draw_edits(known, 3, 2, random.Random(0))
    assert len(held_out) == 2
    assert not set(held_out) & set(trained)
    recent = [fact for fact in EDITS[6:] if fact not in held_out]
    assert trained[: len(recent)] == recent
    assert len(trained) == len(recent) + 3
    assert set(trained[len(recent) :]) <= set(EDITS[:6])


@pytest.mark.parametrize(("edits", "probes", "held_out"), [(8, 32, 2), (5, 1, 1), (5, 32, 2), (1, 32, 0), (0, 32, 0)])
def test_a_quarter_is_held_out_at_most(edits, probes, held_out):
    trained, probed = draw_edits([(fact, True) for fact in EDITS[:edits]], 9, probes, random.Random(0))
    assert (len(trained), len(probed)) == (edits - held_out, held_out)


def test_memories_are_what_is_stored():
    replay = MemoryReplay(memory="both")
    replay.buffer = SimpleNamespace(memories=[SimpleNamespace(fact=EDITS[2])])
    assert stored_edits([LoRAAdjust(), replay]) == {EDITS[2].slot}


@pytest.mark.parametrize("others", [[], [MemoryReplay(memory="consolidated")]])
def test_only_stored_edits_need_a_store(tiny_folder, tmp_path, others):
    with pytest.raises(UserError, match=r"only_stored draws earlier edits .* add MemoryReplay with memory both"):
        fit(tmp_path, editor(tiny_folder), callbacks=[*others, LoRAAdjust(**LORA, only_stored=True)], limit=4)


def test_an_adjustment_sees_no_edit_that_was_not_stored(tiny_folder, tmp_path, monkeypatch):
    """A buffer of two edits: each adjustment trains on those since the last one, and on what the buffer held."""
    replay, seen = MemoryReplay(memory="both", capacity=2), []
    adjust = LoRAAdjust(**LORA, only_stored=True)
    plain = callbacks.lora.callback.edit_rows

    def spy(lm, facts, contexts):
        if list(contexts) == [""]:
            seen.append(({fact.slot for fact in facts}, {memory.fact.slot for memory in replay.buffer.memories}))
        return plain(lm, facts, contexts)

    monkeypatch.setattr(callbacks.lora.callback, "edit_rows", spy)
    module = editor(tiny_folder)
    fit(tmp_path, module, callbacks=[replay, adjust], limit=12)
    batches = {entry.fact.slot: entry.batch for entry in module.ledger}
    for number, (trained, stored) in enumerate(seen):
        earlier = {slot for slot in trained if batches[slot] <= 2 * number - 1}
        assert earlier <= stored
        assert {slot for slot, batch in batches.items() if 2 * number <= batch < 2 * number + 2} <= trained
    assert any(len(trained) < 2 * (number + 1) * module.trainer.datamodule.batch_size
               for number, (trained, _) in enumerate(seen))  # fmt: skip
