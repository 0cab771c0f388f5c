"""Published second moments: the same update as with our own, and one sentence for each file that cannot be right."""

import functools
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from editlab.api import edit_model
from editlab.edits.layer_search import SearchSetup, choose_layers
from editlab.edits.solve_settings import SolveSettings
from editlab.errors import UserError
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moment_files import find_file, read_moments
from editlab.keys.moments import MomentSettings, second_moments
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import MEMIT
from editlab.values.optimize import ValueSettings
from tests.facts import FACTS
from tests.tiny import TEXT, tiny_model, tiny_tokenizer

COUNT = 300
NAME = "model.layers.{}.mlp.down_proj"


@functools.cache
def lm():
    return LanguageModel(tiny_model("llama"), tiny_tokenizer())


@functools.cache
def c0(layer=1):
    """A positive definite matrix of the width of the tiny model's keys, as a mean over COUNT tokens."""
    keys = torch.randn(COUNT, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
    return keys.T @ keys / COUNT


def rome(path, layer=1, count=COUNT, dtype=torch.float64, **changes):
    """Writes a file as the code of ROME and MEMIT does: the sum, not the mean, and names of a combined statistic."""
    arrays = {
        "mom2.constructor": np.array("util.runningstats.SecondMoment()"),
        "mom2.count": np.array(count),
        "mom2.mom2": (COUNT * c0(layer)).to(dtype).numpy(),
        "sample_size": np.array(100000),
    }
    arrays = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def read(path, layer=1):
    return read_moments(Path(path), layer, lm().anatomy)


# ---- what is read -------------------------------------------------------------------------------------------------


def test_a_file_of_rome_is_a_sum_over_tokens(tmp_path):
    path = rome(tmp_path / "tiny" / "wikipedia_stats" / f"{NAME.format(1)}_float32_mom2_100000.npz")
    found = read(path)
    torch.testing.assert_close(found.moments, c0(), rtol=1e-14, atol=0)
    assert str(found) == "300 tokens of wikipedia (100000 documents)"


def test_plain_tensors_are_read_alike(tmp_path):
    sums = {"mom2": COUNT * c0(), "count": torch.tensor(COUNT)}
    torch.save({**sums, "layer": 1, "text": "my own"}, tmp_path / "a.pt")
    save_file(sums, tmp_path / "a.safetensors", {"layer": "1", "text": "my own"})
    for name in ("a.pt", "a.safetensors"):
        found = read(tmp_path / name)
        torch.testing.assert_close(found.moments, c0(), rtol=1e-14, atol=0)
        assert str(found) == "300 tokens of my own"


def test_a_sum_in_float32_counts_as_positive_up_to_its_rounding(tmp_path):
    # One token has a matrix of rank 1, whose 47 other eigenvalues are 0 and come out of float32 on both sides of it.
    key = torch.randn(48, generator=torch.Generator().manual_seed(0))
    path = rome(tmp_path / "a.npz", **{"mom2.mom2": torch.outer(key, key).numpy(), "mom2.count": np.array(1)})
    torch.testing.assert_close(read(path).moments.float(), torch.outer(key, key))


def test_an_absent_number_of_documents_is_a_nan_in_rome(tmp_path):
    assert read(rome(tmp_path / "a.npz", sample_size=np.array(float("nan")))).documents is None


def test_the_file_of_a_layer_is_found_by_its_name(tmp_path):
    for layer in (1, 2, 12):
        rome(tmp_path / f"{NAME.format(layer)}_float32_mom2_100000.npz", layer)
    anatomy = lm().anatomy
    for setting in (str(tmp_path), f"{tmp_path}/{NAME.format('{layer}')}_float32_mom2_100000.npz"):
        assert [find_file(setting, layer, 2, anatomy).name[:14] for layer in (1, 2)] == [
            "model.layers.1", "model.layers.2"
        ]  # fmt: skip


def test_a_run_makes_the_same_update_as_with_its_own_moments(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 10), encoding="utf-8")
    own = MomentSettings(text=str(tmp_path / "text.txt"), tokens=COUNT)
    for layer, moments in second_moments(lm(), [1, 2], own, "tiny").items():
        rome(tmp_path / "llama" / "wikipedia_stats" / f"{NAME.format(layer)}_float64_mom2.npz",
             **{"mom2.mom2": COUNT * moments.numpy()})  # fmt: skip
    updates = []
    for moments in (own, MomentSettings(file=str(tmp_path / "llama" / "wikipedia_stats"))):
        with caplog.at_level(logging.INFO):
            _, result = edit_model(
                tiny_model("llama"), tiny_tokenizer(), FACTS[:2], layers=[1, 2], batch_size=2, progress=False,
                method=MEMIT(covariance_weight=10.0), values=ValueSettings(steps=3), moments=moments,
                contexts=ContextSettings(count=0),
                evaluation=EvaluationSettings(heldout_tokens=0, generation=0, bystanders=0),
            )  # fmt: skip
        updates.append(torch.stack([layer.total for layer in result.editor.layers]))
    assert updates[0].norm() > 0
    assert (updates[1] - updates[0]).norm() < 1e-6 * updates[0].norm()
    assert "300 tokens of wikipedia" in caplog.text


# ---- what is refused ----------------------------------------------------------------------------------------------


def bad(message, path, layer=1):
    with pytest.raises(UserError) as error:
        read(path, layer)
    said = str(error.value)
    assert message in said
    assert "\n" not in said
    assert said.endswith(".")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mom2.mom2": None}, "has no entry mom2.mom2"),
        ({"mom2.count": None}, "has no entry mom2.count"),
        ({"mom2.count": np.array(0)}, "counts 0 tokens"),
        ({"mom2.count": np.array(1.5)}, "count of"),
        ({"mom2.mom2": np.eye(32)}, "are [32, 32], and the keys of layer 1 have 48 features"),
        ({"mom2.mom2": np.eye(48, dtype=np.int64)}, "no matrix of floating-point numbers"),
        ({"mom2.mom2": np.full((48, 48), np.nan)}, "hold NaN or infinity"),
        ({"mom2.mom2": np.zeros((48, 48))}, "are not positive"),
        ({"mom2.mom2": -np.eye(48)}, "are not positive"),
        ({"mom2.mom2": np.eye(48) - 0.5}, "are not positive"),  # eigenvalue 1 - 24 along (1, ..., 1)
        ({"mom2.mom2": np.triu(np.ones((48, 48)))}, "are not symmetric"),
        ({"mom2.mom2": np.array([["x"]], dtype=object)}, "holds Python objects"),
    ],
)  # fmt: skip
def test_content_that_cannot_be_right(tmp_path, changes, message):
    bad(message, rome(tmp_path / "a.npz", **changes))


class Danger:
    """What a pickle may do when it is read."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_files_that_could_run_code_or_are_damaged(tmp_path):
    for name in ("a.npz", "a.pt"):
        (tmp_path / name).write_bytes(pickle.dumps({"mom2": Danger()}))
    torch.save({"mom2": Danger(), "count": 3}, tmp_path / "b.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "a.safetensors").write_bytes(b"half")
    whole = rome(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "bits.npz").write_bytes(whole[:2000] + b"?" + whole[2001:])
    (tmp_path / "a.mat").write_bytes(b"")
    for name, message in (
        ("a.npz", "is no archive of arrays"), ("a.pt", "could run code"), ("b.pt", "could run code"),
        ("list.pt", "holds no dict"), ("a.safetensors", "is damaged"), ("bits.npz", "is damaged"),
        ("a.mat", "give one that ends in .npz, .pt, .safetensors"),
    ):  # fmt: skip
        bad(message, tmp_path / name)


def test_files_of_another_layer_or_module(tmp_path):
    bad("is of layer 2, not of layer 1", rome(tmp_path / f"{NAME.format(2)}_float32_mom2_100000.npz"))
    bad("named after the module mlp.c_proj", rome(tmp_path / "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz"))
    torch.save({"mom2": c0(), "count": 1, "layer": 3}, tmp_path / "a.pt")
    bad("is of layer 3, not of layer 1", tmp_path / "a.pt")


def test_settings_that_name_no_file_for_a_layer(tmp_path):
    one = rome(tmp_path / "one" / "a.npz")
    for name in ("float32_mom2", "float32_mom2_100000"):
        rome(tmp_path / "two" / f"{NAME.format(1)}_{name}.npz")
    for setting, layers, message in (
        (one, 2, "one file, and 2 layers are edited: write {layer}"),
        (tmp_path / "one", 1, "has no second moments of layer 1, a file model.layers.1.mlp.down_proj*"),
        (tmp_path / "two", 1, "has several files of layer 1"),
        (tmp_path / "none.npz", 1, "does not exist"),
        (tmp_path / "{layer}.npz", 1, "1.npz does not exist"),
        ("/dev/zero", 1, "does not exist"),
    ):
        with pytest.raises(UserError) as error:
            find_file(str(setting), 1, layers, lm().anatomy)
        assert message in str(error.value)


def test_a_search_for_layers_needs_a_text():
    setup = SearchSetup(
        lm(), "tiny", "key", SolveSettings(MEMIT()), ValueSettings(), MomentSettings(file="x"), ContextSettings()
    )
    with pytest.raises(UserError, match=r"model\.layers is auto"):
        choose_layers(setup, FACTS[:1])
