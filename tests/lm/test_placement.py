"""Tests that models with offloaded blocks give the same results and edits as the same models loaded normally."""

import lightning as L
import pytest
import torch

from editlab.data import EditDataModule
from editlab.edits.edited_layer import EditedLayer
from editlab.errors import UserError
from editlab.evaluation.scoring import score_pairs
from editlab.keys.moments import MomentSettings, second_moments
from editlab.keys.subject_keys import Site, read_keys
from editlab.lm.fingerprint import fingerprint
from editlab.lm.language_model import LanguageModel
from editlab.lm.placement import load_offloaded, runs_on, weights_of
from editlab.values.optimize import ValueSettings, optimize_values
from tests.facts import FACTS, write_counterfact
from tests.test_editor import editor
from tests.tiny import tiny_model, tiny_tokenizer

BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gemma2": "model.layers"}
EDITED, ABOVE = 1, 2
"""Blocks that are offloaded: one that is edited, and one that the gradient passes."""


def spread(family):
    """Return a device map with two blocks on disk and all other modules on the CPU, where all modules run."""
    model = tiny_model(family)
    top = BLOCKS[family].partition(".")[0]
    map_ = {name: "cpu" for name, _ in model.named_children() if name != top}
    for name, part in model.get_submodule(top).named_children():
        path = f"{top}.{name}"
        if path == BLOCKS[family]:
            map_ |= {f"{path}.{i}": "disk" if i in (EDITED, ABOVE) else "cpu" for i in range(len(part))}
        else:
            map_[path] = "cpu"
    return map_


@pytest.fixture(params=BLOCKS)
def pair(request, tmp_path):
    """Load one model twice: normally, and with offloaded blocks."""
    tiny_model(request.param).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    load = lambda device_map: LanguageModel.from_name(str(tmp_path / "model"), torch.float32, device_map=device_map)
    return load(None), load(spread(request.param))


def equal(measure, plain, placed):
    return all(torch.equal(a, b) for a, b in zip(measure(plain), measure(placed), strict=True))


def readings(lm):
    """Compute values, keys, moments and scores of the unedited model."""
    site, facts = Site.of(lm, EDITED), FACTS[:3]
    values = optimize_values(lm, facts, site, ["", "Oslo lies in Norway. "], ValueSettings(steps=4, matmul="float32"))
    keys = read_keys(lm, facts, EDITED, site, [""], "bare")
    moments = second_moments(lm, [EDITED], MomentSettings(tokens=200, cache=False), "tiny")
    scores = score_pairs(lm, [(f.question, f.target_new) for f in facts])
    return [values.target, values.loss, keys.keys, keys.current, keys.context_keys, moments[EDITED], *scores]


def test_a_spread_model_is_the_same_model(pair):
    plain, placed = pair
    assert (plain.placed, placed.placed) == (False, True)
    assert placed.anatomy.edit_module(EDITED).weight.is_meta  # it really is offloaded
    assert placed.device == runs_on(placed.anatomy.edit_module(EDITED)) == torch.device("cpu")
    assert placed.anatomy.edit_path == plain.anatomy.edit_path
    assert placed.anatomy.additive == plain.anatomy.additive
    assert fingerprint(placed.model) == fingerprint(plain.model)
    assert equal(readings, plain, placed)
    # A pass that was ended early leaves no loaded weights behind.
    assert placed.anatomy.edit_module(ABOVE).weight.is_meta


def test_an_edit_of_an_offloaded_block_persists(pair):
    plain, placed = pair
    before = fingerprint(placed.model)
    layers = [EditedLayer(lm.anatomy.edit_module(EDITED), lm.anatomy.transposed(EDITED)) for lm in pair]
    update = 0.1 * torch.randn(layers[0].total.shape, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        layer.add(update)
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert equal(readings, plain, placed)
    assert fingerprint(placed.model) == fingerprint(plain.model) != before
    for layer in layers:
        layer.restore(torch.zeros_like(layer.total))
    assert fingerprint(placed.model) == before  # the file on the disk was not written to


def test_a_placed_model_is_not_moved(pair):
    plain, placed = pair
    torch.nn.ModuleList([placed]).to(torch.float64)  # the Trainer moves its module in the same way
    assert {t.dtype for _, t in weights_of(placed.model)} == {torch.float32}
    assert placed.anatomy.edit_module(ABOVE).weight.is_meta
    assert plain.to(torch.float64).model.dtype == torch.float64


def test_a_run_on_a_spread_model(tiny_folder, tmp_path):
    totals = {}
    for name, device_map in (("plain", None), ("spread", spread("llama"))):
        module = editor(tiny_folder, device_map=device_map)
        data = EditDataModule(str(write_counterfact(tmp_path / "facts.json")), limit=4, batch_size=2, keep="all")
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
            default_root_dir=tmp_path / name,
        )  # fmt: skip
        trainer.fit(module, data)
        totals[name] = [layer.total for layer in module.layers]
    assert all(torch.equal(a, b) for a, b in zip(totals["plain"], totals["spread"], strict=True))
    assert all(bool(total.any()) for total in totals["plain"])


def test_impossible_device_maps_raise_an_error(tiny_folder):
    with pytest.raises(UserError, match="cannot be loaded"):
        LanguageModel.from_name(str(tiny_folder), torch.float32, device_map="everywhere")
    module = torch.nn.Linear(2, 2, device="meta")  # offloaded by a hook of the block around it
    with pytest.raises(UserError, match="place its block on a device"):
        load_offloaded(module)
