"""Tests of the selection and order of the facts to edit, and of resuming the stream under a real Trainer."""

from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.apply_func import apply_to_collection

from editlab.data import EditDataModule, EditStream
from editlab.data.fact import latest
from editlab.errors import UserError
from tests.facts import FACTS, write_counterfact


@pytest.fixture
def path(tmp_path):
    return str(write_counterfact(tmp_path / "facts.json"))


def module(path, **settings):
    data = EditDataModule(path, **settings)
    data.setup()
    return data


def test_the_seed_sets_the_order(path):
    orders = [[f.id for f in module(path, seed=s).candidates] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    assert [f.id for f in module(path, shuffle=False).candidates] == [f.id for f in FACTS]


def test_facts_are_scored_only_until_enough_are_found(path, monkeypatch):
    monkeypatch.setattr("editlab.data.datamodule.CHUNK", 4)
    scored = []

    def is_known(facts):
        scored.extend(facts)
        return [fact.id % 2 == 0 for fact in facts]

    data = module(path, limit=3, shuffle=False)
    data.select(is_known)
    assert [f.id for f in data.facts] == [f.id for f in FACTS if f.id % 2 == 0][:3]
    assert len(scored) == 8  # facts 0 to 7 in chunks of four: 0, 2 and 4 are enough


def test_selections_that_raise_an_error(path, tmp_path):
    with pytest.raises(UserError, match="prefers the truth of none"):
        module(path).select(lambda facts: [False] * len(facts))
    bare = tmp_path / "bare.json"
    bare.write_text('[{"requested_rewrite": {"prompt": "{} is", "subject": "Oslo", "target_new": {"str": "Peru"}}}]')
    with pytest.raises(UserError, match=r"set data\.keep to all"):
        module(str(bare)).select(lambda facts: [True] * len(facts))
    data = module(str(bare), keep="all")
    data.select(lambda facts: 1 / 0)  # is not called
    assert len(data.facts) == 1
    for name in ("limit", "batch_size", "bystanders"):
        with pytest.raises(UserError, match=f"data.{name} is 0"):
            EditDataModule(path, **{name: 0})


def test_the_selection_counts_what_was_measured(path):
    """Facts 0 to 7 in two chunks; only half of them are held, and three are wanted."""
    for keep in ("preferred", "known"):
        data = module(path, limit=3, shuffle=False, keep=keep)
        data.select(lambda facts: [fact.id % 2 == 1 for fact in facts])
        # Each of facts 1, 3 and 5 has two neighbors; the one about India, fact 5, is left out of the other two facts.
        assert data.selection == {
            "path": path, "keep": keep, "split": "all", "facts": len(FACTS), "checked": 6, keep: 3, "neighbors": 6,
            "neighbors_left_out": 2,
        }  # fmt: skip
        assert [len(fact.neighbors) for fact in data.facts] == [1, 1, 2]
    data = module(path, keep="all")
    data.select(lambda facts: 1 / 0)
    assert not {"checked", "preferred", "known"} & set(data.selection)


def test_the_halves_divide_a_file_whatever_the_order(path):
    halves = {split: module(path, split=split, shuffle=False).candidates for split in ("dev", "test")}
    assert sorted(f.id for half in halves.values() for f in half) == sorted(f.id for f in FACTS)
    assert all(fact.side == split for split, half in halves.items() for fact in half)
    shuffled = module(path, split="dev", seed=3, limit=2).candidates
    assert {f.id for f in shuffled} == {f.id for f in halves["dev"]}
    data = module(path, split="test", keep="all", limit=2, bystanders=3)
    data.select(lambda facts: [])
    assert all(fact.side == "test" for batch in data.test_dataloader() for fact in batch)
    for setting in ({"split": "train"}, {"keep": "some"}):
        with pytest.raises(UserError, match="it must be one of all, "):
            EditDataModule(path, **setting)


def test_a_half_without_facts_raises_an_error(tmp_path):
    path = write_counterfact(tmp_path / "one.json", FACTS[:1])
    other = {"dev": "test", "test": "dev"}[FACTS[0].side]
    with pytest.raises(UserError, match=f"is in the {other} half: set data.split to all"):
        module(str(path), split=other)


def unfit(*numbers):
    """Return a function that reports a fault for the facts with these numbers."""
    return lambda fact: "is too long: shorten it" if fact.id in numbers else None


def test_facts_that_do_not_fit_raise_an_error_only_if_they_are_needed(path):
    for keep in ("all", "preferred", "known"):
        data = module(path, limit=3, shuffle=False, keep=keep)
        data.fault = unfit(FACTS[2].id)
        with pytest.raises(
            UserError, match=r"^The fact 'The capital of Norway is'\.\.\. is too long: shorten it, or skip"
        ):
            data.select(lambda facts: [True] * len(facts))
    data = module(path, limit=2, shuffle=False, keep="all")
    data.fault = unfit(FACTS[2].id)
    data.select(lambda facts: 1 / 0)
    assert data.facts == FACTS[:2]
    with pytest.raises(UserError, match="is too long"):
        data.test_dataloader()


def test_facts_that_do_not_fit_are_skipped_with_skip_bad(path, caplog):
    bad = [FACTS[i].id for i in (1, 4, len(FACTS) - 2)]
    good = [fact for fact in FACTS if fact.id not in bad]
    for keep in ("all", "preferred", "known"):
        data = module(path, limit=3, shuffle=False, keep=keep, skip_bad=True, bystanders=3)
        data.fault = unfit(*bad)
        assert data.facts_to_try(4) == [*good[3:-3][-4:]]
        data.select(lambda facts: [True] * len(facts))
        assert data.facts == good[:3]
        bystanders = [fact for batch in data.test_dataloader() for fact in batch]
        assert bystanders == good[:-4:-1]
        assert data.spare_facts(2) == good[-4:-6:-1]
    assert caplog.text.count("Skipped: the fact 'The capital of Japan is'... is too long: shorten it.") == 3
    data = module(path, skip_bad=True, keep="all")
    data.fault = lambda fact: "is too long"
    with pytest.raises(UserError, match="None of the facts in"):
        data.select(lambda facts: [])


def test_repeated_slots_are_dropped(tmp_path, caplog):
    path = write_counterfact(tmp_path / "twice.json", [*FACTS, *FACTS[:3]])
    with caplog.at_level("INFO", logger="editlab"):
        data = module(str(path))
    assert len(data.candidates) == len(FACTS)
    assert "3 records" in caplog.text


def test_bystanders_share_no_subject_with_edits(path):
    data = module(path, limit=5, keep="all", bystanders=4)
    data.select(lambda facts: [])
    others = [fact for batch in data.test_dataloader() for fact in batch]
    assert len(others) == 4
    assert not {f.subject for f in others} & {f.subject for f in data.facts}
    everything = module(path, keep="all")
    everything.select(lambda facts: [])
    with pytest.raises(UserError, match=r"lower data\.limit"):
        everything.test_dataloader()


def test_other_facts_are_built_in_and_share_no_subject_with_edits(path):
    """Of a run of another file they are any built-in facts, of the built-in facts those that ``test`` measures."""
    data = module(path, limit=5, keep="all")
    data.select(lambda facts: [])
    others = data.other_facts(8)
    assert len(others) == 8
    assert all(fact.target_true for fact in others)
    assert not {f.subject for f in others} & {f.subject for f in data.facts}
    assert data.other_facts(8) == others
    data.fault = unfit(others[0].id)
    assert data.other_facts(7) == others[1:]
    builtin = module("worldfacts", limit=5, keep="all", bystanders=6)
    builtin.select(lambda facts: [])
    measured = [fact for batch in builtin.test_dataloader() for fact in batch]
    assert builtin.other_facts(4) == measured[:4]
    assert builtin.other_facts(99) == measured  # the further ones may be held out by TrustRollback
    given = EditDataModule(keep="all")  # as edit_model does
    given.candidates = [*builtin.candidates[:3]]
    given.select(lambda facts: [])
    assert not {f.subject for f in given.other_facts(5)} & {f.subject for f in builtin.candidates[:3]}
    assert given.other_facts(0) == []


class Toy(L.LightningModule):
    """Records the batches that it is given."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.0)

    def training_step(self, batch, batch_idx):
        self.seen.append([fact.id for fact in batch])
        # Nothing is prefetched: the position of the stream is right after the current batch.
        assert self.trainer.train_dataloader.position == len(self.seen) + self.trainer.resumed
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        raise AssertionError("nothing is validated within fit")


def fit(path, folder, *, max_steps=-1, ckpt_path=None, resumed=0):
    data = EditDataModule(path, batch_size=4, keep="all", limit=14)
    data.setup()
    data.select(lambda facts: [])
    trainer = L.Trainer(
        max_epochs=1, max_steps=max_steps, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
    )  # fmt: skip
    trainer.resumed = resumed
    toy = Toy()
    trainer.fit(toy, data, ckpt_path=ckpt_path)
    return toy.seen


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_resumed_run_sees_the_rest_of_the_stream(path, tmp_path, k):
    whole = fit(path, tmp_path / "whole")
    assert [len(batch) for batch in whole] == [4, 4, 4, 2]
    first = fit(path, tmp_path / "part", max_steps=k)
    rest = fit(path, tmp_path / "part", ckpt_path=str(tmp_path / "part" / f"step={k}.ckpt"), resumed=k)
    assert first + rest == whole


def test_stream_state():
    stream = EditStream(FACTS[:5], 2)
    assert len(stream) == 3
    iterator = iter(stream)
    next(iterator)
    other = EditStream(FACTS[:5], 2)
    other.load_state_dict(stream.state_dict())
    assert [batch.facts for batch in other] == [batch.facts for batch in iterator] == [FACTS[2:4], FACTS[4:5]]
    assert len(list(other)) == 3  # a second pass starts at the first batch


def test_lightning_leaves_a_batch_unchanged():
    # Lightning's half-precision plug-ins convert each batch; a frozen dataclass in it would raise an error.
    (batch,) = EditStream(FACTS[:2], 2)
    assert apply_to_collection(batch, torch.Tensor, lambda tensor: tensor.bfloat16()) is batch
    assert list(batch) == FACTS[:2]
    assert len(batch) == 2


def test_latest_keeps_the_last_fact_of_each_slot():
    again = replace(FACTS[0], target_new="Lima")
    assert latest([FACTS[0], FACTS[1], again, FACTS[2]]) == [FACTS[1], again, FACTS[2]]
    assert latest([]) == []
