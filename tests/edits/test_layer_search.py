"""The choice of layers: each trial against a run of the same edits, its measurements, and the cached choice."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml

from editlab import edit_model
from editlab import editor as editor_module
from editlab.cli.main import main
from editlab.data.fact import Fact
from editlab.editor import SequentialEditor
from editlab.edits import layer_search as layers
from editlab.edits.layer_search import Search, SearchSetup, Trial, best, coarse, table
from editlab.evaluation.scoring import score_pairs
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.lm.fingerprint import fingerprint
from editlab.lm.language_model import LanguageModel
from editlab.solver.methods import EMMET, ROME
from editlab.utils.disk_cache import read_checked
from editlab.values.optimize import ValueSettings
from tests.cli.commands.runs import same_bits
from tests.facts import FACTS
from tests.recipes import write_recipe
from tests.test_api import SMALL
from tests.test_editor import editor, fit
from tests.tiny import tiny_model, tiny_tokenizer

BARE = [Fact(f.subject, f.prompt, f.target_new, id=f.id) for f in FACTS]
"""Facts without truths, paraphrases and neighbors."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder for each test, because choices are cached."""
    monkeypatch.setenv("EDITLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def automatic(family="llama", **changes):
    """An editor with its model, whose layers are not chosen yet."""
    settings = {
        "layers": "auto", "values": ValueSettings(steps=6, lr=0.5, clamp=3.0),
        "moments": MomentSettings(tokens=96), "contexts": ContextSettings(length=4), **changes,
    }  # fmt: skip
    module = SequentialEditor(family, **settings)
    module.use(LanguageModel(tiny_model(family), tiny_tokenizer(bos=True)))
    return module


def setup_of(module):
    """The setup of a search for an editor."""
    return SearchSetup(module.lm, module.language_model, module.model_key, module.solve_settings, module.values,
                       module.moments, module.context_settings)  # fmt: skip


# ---- numbers by hand


def test_a_score_is_the_harmonic_mean_of_what_was_measured():
    assert Trial((1,), 0.5, 1.0, 0.5).score == pytest.approx(3 / (2 + 1 + 2))
    assert Trial((1,), 0.5, 1.0, None).score == pytest.approx(2 / (2 + 1))
    assert Trial((1,), 0.5, 0.0, 1.0).score == 0


def test_of_equal_trials_fewer_and_lower_layers_are_best():
    trials = [Trial(at, 0.5, 0.5, 0.5) for at in ((3,), (2,), (1, 2))]
    assert best(trials).layers == (2,)
    assert best([*trials, Trial((3, 4), 0.6, 0.5, 0.5)]).layers == (3, 4)


def test_the_table_has_a_line_a_trial_and_a_star():
    text = table([Trial((3,), 0.25, 0.5, None), Trial((2,), 0.9, 0.8, 0.7), Trial((1, 2, 3), 0.5, 0.5, 0.5)])
    assert [line.split() for line in text.splitlines()] == [
        ["layers", "efficacy", "generality", "locality", "score"],
        ["*", "2", "0.900", "0.800", "0.700", "0.792"],  # 3 / (1/.9 + 1/.8 + 1/.7)
        ["3", "0.250", "0.500", "-", "0.333"],
        ["1,", "2,", "3", "0.500", "0.500", "0.500", "0.500"],
    ]


def test_the_first_candidates_are_evenly_spaced():
    assert coarse(range(29)) == [2, 7, 12, 16, 21, 26]  # the middles of six parts of 29 layers
    assert coarse([0, 1, 2]) == [0, 1, 2]
    assert coarse([5]) == [5]


# ---- trials


@pytest.mark.parametrize(("at", "spread"), [((1,), "residual"), ((1, 2), "each")])
def test_a_trial_is_what_a_run_would_do(at, spread, tiny_folder, tmp_path):
    """A Trainer's run of the same facts in one batch leaves the probabilities that the trial has measured."""
    contexts, moments = ContextSettings(layers.CONTEXTS, 4), MomentSettings(tokens=96)
    values = ValueSettings(steps=6, lr=0.5, clamp=3.0, spread=spread)
    module = editor(tiny_folder, layers=list(at), contexts=contexts, moments=moments, values=values)
    fit(tmp_path, module, limit=10, batch_size=10)
    pairs = [(fact.question, fact.target_new) for fact in FACTS[:10]]
    expected = score_pairs(module.lm, pairs)[0].exp().mean()
    contexts = ContextSettings(length=4)
    other = editor(tiny_folder, layers="auto", contexts=contexts, moments=moments, values=values)
    other.use(LanguageModel.from_name(str(tiny_folder), torch.float32))
    search = Search(setup_of(other), FACTS)
    search.try_at(at)
    assert search.trials[at].efficacy == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("method", [EMMET(), ROME()])
def test_the_model_is_left_as_it_was(method):
    module = automatic(method=method)
    with torch.no_grad():  # a sum of nothing would turn it into 0.0
        module.lm.anatomy.edit_module(1).weight[0, 0] = -0.0
    before, rng = fingerprint(module.lm.model), torch.get_rng_state()
    found = module.find_layers(FACTS)
    assert fingerprint(module.lm.model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert module.layer_numbers == []
    assert set(found) <= {0, 1, 2}  # above layer 3 no token reads what was edited


def test_the_best_is_found_by_trying(monkeypatch):
    """Scores of 30 layers replace the edits: the highest is reached from the coarse grid."""
    search = object.__new__(Search)
    search.trials = {}
    search.lm = type("", (), {})()
    search.lm.anatomy = type("", (), {"editable": list(range(30)), "blocks": range(30), "additive": True})()

    def try_at(layers):
        peak = 0.9 - 0.02 * abs(layers[-1] - 10) + (0.05 if len(layers) == 3 else 0)
        search.trials.setdefault(layers, Trial(layers, peak, peak, peak))

    search.try_at, search.setup = try_at, SimpleNamespace(solve=SimpleNamespace(site=None))
    monkeypatch.setattr(layers.Site, "of", lambda *a: SimpleNamespace(in_stream=True))
    trials = search.run()
    # From the grid up to where it has fallen twice, to both sides of 12, and spread over what ends at the best.
    assert [t.layers for t in trials] == [(2,), (7,), (12,), (16,), (21,), (10,), (14,), (8, 9, 10)]
    assert best(trials).layers == (8, 9, 10)


def test_only_one_layer_if_a_norm_follows_the_mlp():
    search = Search(setup_of(automatic("gemma2")), FACTS)
    trials = search.run()
    assert {trial.layers for trial in trials} == {(0,), (1,), (2,)}
    assert all(0 <= trial.score <= 1 for trial in trials)


# ---- what is measured


def evaluator(facts):
    return Search(setup_of(automatic()), facts).evaluator


def test_ten_facts_are_edited_and_locality_is_measured_at_their_neighbors():
    measured = evaluator(FACTS)
    assert measured.facts == FACTS[:10]
    assert set(measured.locality_prompts) == {n.prompt for fact in FACTS[:10] for n in fact.neighbors}
    assert len(measured.contexts) == 1 + layers.CONTEXTS
    assert measured.unseen not in measured.contexts


def test_without_neighbors_locality_is_measured_at_the_prompts_of_other_facts():
    measured = evaluator(BARE[:8])
    assert measured.facts == BARE[:4]
    assert measured.locality_prompts == [fact.question for fact in BARE[4:8]]


def test_neighbors_of_facts_that_are_not_edited_do_not_count():
    facts = [*BARE[2:12], *FACTS[:2]]
    assert any(fact.neighbors for fact in facts)
    measured = evaluator(facts)
    assert measured.facts == BARE[2:8]
    assert measured.locality_prompts == [fact.question for fact in facts[6:]]


def test_of_a_single_fact_no_locality_is_measured():
    measured = evaluator(BARE[:1])
    assert measured.facts == BARE[:1]
    efficacy, generality, locality = measured.evaluate(slice(None))
    assert locality is None
    assert 0 < efficacy < 1
    assert 0 < generality < 1


def test_locality_by_hand():
    """1 minus half the sum of the changes of all tokens' probabilities, at each locality prompt."""
    measured = evaluator(FACTS)
    assert measured.evaluate(slice(None))[2] == pytest.approx(1, abs=1e-6)
    before = distributions(measured)
    with torch.no_grad():
        measured.lm.anatomy.edit_module(1).weight.mul_(3)
    changed = (distributions(measured) - before).abs().sum(1) / 2
    assert measured.evaluate(slice(None))[2] == pytest.approx(1 - float(changed.mean()), abs=1e-5)
    assert float(changed.mean()) > 0.1


@torch.no_grad()
def distributions(measured):
    rows = [measured.lm.tokenizer(prompt, return_tensors="pt").input_ids for prompt in measured.locality_prompts]
    return torch.stack([measured.lm.model(row).logits[0, -1].softmax(0) for row in rows])


def test_generality_is_measured_on_paraphrases_if_there_are_some():
    measured = evaluator(FACTS)
    pairs = [(prompt, fact.target_new) for fact in FACTS[:10] for prompt in fact.paraphrases[:1]]
    assert measured.evaluate(slice(None))[1] == pytest.approx(float(score_pairs(measured.lm, pairs)[0].exp().mean()))
    measured = evaluator(BARE)
    pairs = [(measured.unseen + fact.question, fact.target_new) for fact in measured.facts]
    assert measured.evaluate(slice(None))[1] == pytest.approx(float(score_pairs(measured.lm, pairs)[0].exp().mean()))


# ---- what is kept


def test_a_choice_is_kept_and_depends_on_what_it_was_made_from(monkeypatch, cache):
    found = automatic().find_layers(FACTS)
    (kept,) = (cache / "layers").iterdir()
    assert {"layers", "efficacy", "generality", "locality"} == json.loads(read_checked(kept))[0].keys()
    monkeypatch.setattr(Search, "run", lambda self: pytest.fail("tried again"))
    assert automatic().find_layers(FACTS) == found
    monkeypatch.undo()
    monkeypatch.setenv("EDITLAB_CACHE", str(cache))
    for changed, facts in [
        (automatic(method=EMMET(gram_ridge=0.5)), FACTS),
        (automatic(keys="mean"), FACTS),
        (automatic(values=ValueSettings(steps=2)), FACTS),
        (automatic("qwen2"), FACTS),
        (automatic(condition_limit=1e3), FACTS),
        (automatic(), FACTS[1:]),
    ]:
        changed.find_layers(facts)
    assert len(list((cache / "layers").iterdir())) == 7
    whole = kept.read_bytes()
    for damaged in (b"", b"[{}]", whole[:-1], whole.replace(b"0.", b"1.", 1)):
        kept.write_bytes(damaged)
        assert automatic().find_layers(FACTS) == found  # tried again
        assert kept.read_bytes() == whole


def test_conventions_enter_the_key_of_a_choice_unless_they_are_the_former_ones():
    def key(**changes):
        return setup_of(automatic(method=ROME(), **changes)).cache_key(FACTS)

    others = [
        {"keys": "templates"}, {"site": "mlp"}, {"conventions": "published"},
        {"conventions": "published", "site": "stream"},
        {"values": ValueSettings(steps=6, lr=0.5, clamp=3.0, kl_at="subject")},
    ]  # fmt: skip
    assert len({key(), *(key(**changes) for changes in others)}) == 6
    assert key(values=ValueSettings(steps=6, lr=0.5, clamp=3.0, kl_at="prompt")) == key(keys="bare") == key()
    assert "bare_denominator" not in repr(automatic().solve_settings)  # an older version's caches stay valid


def test_a_target_at_the_mlp_is_never_spread_over_several_layers(monkeypatch, cache):
    tried = []
    monkeypatch.setattr(Search, "try_at", lambda self, layers: tried.append(layers))
    for changes, most in (({}, 3), ({"site": "mlp"}, 1)):
        tried.clear()
        search = Search(setup_of(automatic(**changes)), FACTS)
        search.trials = {(2,): Trial((2,), 1.0, 1.0, 1.0)}
        search.run()
        assert max(map(len, tried)) == most


# ---- whole runs


@pytest.fixture
def recipe(tiny_folder, tmp_path, monkeypatch):
    """A recipe with ``layers: auto``."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "layers": "auto",
        "values": {"steps": 4},
        "evaluation": {"heldout_tokens": 64, "generation": 0, "bystanders": 0, "generated_texts": 0},
    }
    write_recipe(tmp_path, tiny_folder, model=settings, data={"bystanders": 2})
    return ["fit", "--config", "tiny.yaml"]


def last(place, version=0):
    path = place / "lightning_logs" / "tiny" / f"version_{version}" / "checkpoints" / "last.ckpt"
    return torch.load(path, weights_only=True)


def test_a_run_that_names_no_layer_is_one_that_names_those_found(recipe, tmp_path, capsys):
    assert main(recipe) == 0
    shown = capsys.readouterr().out
    assert "The layer to edit, by edits of 10 facts" in shown
    found = last(tmp_path)["editor"]["layers"]
    run = tmp_path / "lightning_logs" / "tiny" / "version_0"
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["layers"] == found
    assert main([*recipe, f"--model.layers={found}"]) == 0
    assert main(["fit", "--config", str(run / "config.yaml"), "--trainer.logger.init_args.version=2"]) == 0
    for version in (1, 2):
        assert same_bits(last(tmp_path)["state_dict"], last(tmp_path, version)["state_dict"])
        assert last(tmp_path)["editor"]["table"] == last(tmp_path, version)["editor"]["table"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_has_the_layers_of_its_checkpoint(recipe, tmp_path, monkeypatch):
    assert main([*recipe, "--trainer.max_steps=1"]) == 0
    found = last(tmp_path)["editor"]["layers"]
    monkeypatch.setattr(editor_module, "choose_layers", lambda *_: pytest.fail("chosen again"))
    assert main([*recipe, "--ckpt_path=last"]) == 0
    assert last(tmp_path)["editor"]["layers"] == found
    assert len(last(tmp_path)["editor"]["ledger"]) == 4
    assert main(["validate", *recipe[1:], "--ckpt_path=last"]) == 0
    assert main(["test", *recipe[1:]]) == 0  # of the unedited model, which needs no layer


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_from_python(family):
    settings = {**SMALL, "layers": "auto"}
    _, result = edit_model(tiny_model(family), tiny_tokenizer(bos=True), FACTS[:6], **settings)
    assert result.editor.layer_numbers
    assert set(result.editor.layer_numbers) <= {0, 1, 2}
    named = {**settings, "layers": result.editor.layer_numbers}
    _, same = edit_model(tiny_model(family), tiny_tokenizer(bos=True), FACTS[:6], **named)
    for one, other in zip(result.editor.layers, same.editor.layers, strict=True):
        assert torch.equal(one.total, other.total)
