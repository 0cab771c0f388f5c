"""Methods without a closed form in a whole run: callbacks, verdicts, resume, the measurements, and what is refused."""

from dataclasses import replace

import lightning as L
import pytest
import torch

from callbacks import DownstreamEval, LoRAAdjust, MemoryReplay, TrustRollback
from editlab import edit_model
from editlab.callback import EditCallback
from editlab.data import EditDataModule
from editlab.editor import SequentialEditor
from editlab.edits import trained_batch
from editlab.edits.solve_settings import SolveSettings
from editlab.errors import UserError
from editlab.evaluation.retrieval import Retrieval
from editlab.evaluation.scoring import score_pairs
from editlab.evaluation.settings import EvaluationSettings
from editlab.experiments.faults import InjectFaults
from editlab.runs.delta import Delta
from editlab.solver.methods import MEMIT
from editlab.training.methods import FineTune, LoRAOnly
from tests.facts import FACTS
from tests.runs.test_resume import same
from tests.test_api import SMALL, changed, weights
from tests.test_editor import editor, fit
from tests.tiny import tiny_model, tiny_tokenizer

TUNE = FineTune(lr=1e-2, epochs=4, mini_batch=2, matmul="float32")
LOW_RANK = LoRAOnly(lr=2e-2, epochs=4, mini_batch=2, rank=2, dropout=0.1, matmul="float32")
UNMEASURED = EvaluationSettings(heldout_tokens=0, generation=0, bystanders=0, generated_texts=0)
KINDS = {"FineTune": TUNE, "LoRAOnly": LOW_RANK}


def run(method, *callbacks, facts=FACTS[:4], **settings):
    """Edits facts in a tiny model: its weights before, the model, and the result."""
    model = tiny_model("llama")
    before = weights(model)
    _, result = edit_model(
        model,
        tiny_tokenizer(),
        facts,
        callbacks=callbacks,
        **{**SMALL, "evaluation": UNMEASURED, "method": method, **settings},
    )
    return before, model, result


def last(folder, name):
    """The checkpoint of a run."""
    return folder / "logs" / name / "version_0" / "checkpoints" / "last.ckpt"


class Requests(EditCallback):
    """Makes given requests in each batch, and keeps the outcomes."""

    def __init__(self, request=lambda outcome: None):
        self.request, self.outcomes = request, []

    def on_edit_applied(self, trainer, editor, outcome):
        if not outcome.dropped:
            self.request(outcome)

    def on_edit_settled(self, trainer, editor, outcome):
        self.outcomes.append(outcome)


def test_fine_tuning_learns_and_is_reverted():
    before, model, result = run(FineTune(lr=1e-2, epochs=25, matmul="float32"), batch_size=4)
    assert result.retained["accuracy"] == 1.0  # trained until the loss was low
    assert changed(before, model) == [f"model.layers.{n}.mlp.down_proj.weight" for n in (1, 2)]
    result.revert()
    assert changed(before, model) == []


def test_a_scaled_batch_keeps_a_fraction_of_its_update():
    spy = Requests(lambda outcome: outcome.scale(0.25, "because"))
    _, _, result = run(TUNE, spy, facts=FACTS[:2])
    (outcome,) = spy.outcomes
    for number, layer in result.editor.layers_by_number.items():
        torch.testing.assert_close(layer.total, 0.25 * outcome.updates[number])
    assert outcome.diagnostics["epochs"] == 4
    assert outcome.diagnostics["layer_1/update_norm"] > 0


def test_a_batch_without_dropped_facts_is_trained_again():
    _, _, dropped = run(TUNE, Requests(lambda outcome: outcome.drop([1], "because")), facts=FACTS[:2])
    _, _, alone = run(TUNE, facts=FACTS[:1])
    assert [len(result.facts) for result in (dropped, alone)] == [1, 1]
    for one, other in zip(dropped.editor.layers, alone.editor.layers, strict=True):
        assert torch.equal(one.total, other.total)


def test_a_rolled_back_batch_leaves_no_bit():
    before, model, result = run(TUNE, Requests(lambda outcome: outcome.roll_back("because")))
    assert changed(before, model) == []
    assert result.facts == []


def test_replayed_facts_are_trained_with_the_batch(monkeypatch):
    trained = []
    plain = trained_batch.train

    def spied(method, lm, layers, facts, weights, step):
        trained.append((list(facts), list(weights)))
        return plain(method, lm, layers, facts, weights, step)

    monkeypatch.setattr(trained_batch, "train", spied)
    replay = MemoryReplay(rate=0.5, weight=0.5, sampling="oldest")
    run(TUNE, replay)
    # Two batches of two facts; the second one replays the oldest fact with half of the weight of its own.
    assert trained == [(FACTS[:2], [1.0, 1.0]), ([*FACTS[2:4], FACTS[0]], [1.0, 1.0, 0.5])]
    assert [memory.fact for memory in replay.buffer.memories] == FACTS[:4]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("kind", ["FineTune", "LoRAOnly"])
def test_a_run_that_was_stopped_resumes_with_the_same_bits(kind, tiny_folder, tmp_path):
    def go(name, steps, **stop):
        module = editor(tiny_folder, method=KINDS[kind], evaluation=UNMEASURED)
        callbacks = [MemoryReplay(rate=1.0)] if kind == "FineTune" else []
        trainer = fit(tmp_path, module, callbacks=callbacks, limit=2, batch_size=1, save=True, name=name, **stop)
        assert trainer.global_step == steps
        return torch.load(last(tmp_path, name), weights_only=True)

    one = go("whole", 2)
    go("part", 1, max_steps=1)
    other = go("part", 2, ckpt_path=str(last(tmp_path, "part")))
    assert same(one["state_dict"], other["state_dict"])
    assert same(one["editor"]["rng"], other["editor"]["rng"])
    assert same(one["editor"]["table"], other["editor"]["table"])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_retrieval_is_validated_and_gives_errors_as_a_delta(tiny_folder, tmp_path):
    def module():
        return editor(tiny_folder, method=Retrieval(), evaluation=UNMEASURED)

    fitted = fit(tmp_path, module(), limit=2, save=True).lightning_module
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, inference_mode=False)
    data = EditDataModule(str(tmp_path / "facts.json"), keep="all", shuffle=False)
    (measured,) = trainer.validate(module(), data, ckpt_path=str(last(tmp_path, "run")), verbose=False)
    for name in ("retained/ES_magnitude", "retained/PS_magnitude"):
        assert measured[name] == pytest.approx(fitted.evaluation.retained[name])
    with pytest.raises(UserError, match="had the method Retrieval, which changes no weight: measure it"):
        Delta.from_checkpoint(last(tmp_path, "run"))


def test_neither_contexts_nor_second_moments_nor_values_are_computed(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("not needed")

    monkeypatch.setattr("editlab.editor.sample_contexts", fail)
    monkeypatch.setattr("editlab.edits.batch.second_moments", fail)
    spy = Requests()
    run(TUNE, spy, facts=FACTS[:2])
    assert spy.outcomes[0].plan.targets.first.shape == (2, 0)


def test_retrieval_measures_the_unedited_model_behind_the_edits():
    exact = replace(UNMEASURED, matmul="float32")
    before, model, result = run(Retrieval(), facts=FACTS[:4], evaluation=exact)
    assert changed(before, model) == []
    lm = result.editor.lm
    # The score of each edit's prompt behind its own statement, and before the edit without it.
    stated = [(f"New fact: {f.question} {f.target_new}.\n{f.question}", f.target_new) for f in FACTS[:4]]
    for group, pairs in (("immediate", stated), ("before", [(f.question, f.target_new) for f in FACTS[:4]])):
        expected, _ = score_pairs(lm, pairs)
        torch.testing.assert_close(result.editor.evaluation.scores(group).edit.logp_new, expected)
    assert result.summary["edits"] == 4
    assert result.summary["delta_norm"] == {"1": 0.0, "2": 0.0}


def test_only_the_retained_edits_are_retrieved():
    roll_back_first = Requests(lambda outcome: outcome.plan.step or outcome.roll_back("because"))
    _, _, result = run(Retrieval(), roll_back_first)
    assert result.facts == FACTS[2:4]
    memory = result.editor.evaluation.memory
    questions = [fact.question for fact in memory.before_prompts(result.editor.lm, [FACTS[0], FACTS[2]])]
    assert [question.count("\n") for question in questions] == [0, 1]


@pytest.mark.parametrize("method", [TUNE, Retrieval()], ids=["FineTune", "Retrieval"])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"key_mode": "mean"}, "keys"),
        ({"context_key_weight": 1.0}, "preserve_prompt_tokens"),
        ({"passes": 2}, "passes"),
        ({"condition_limit": 1e5}, "condition_limit"),
        ({"device": "cpu"}, "solver_device"),
    ],
)
def test_errors_of_settings_of_the_closed_form(method, settings, name):
    with pytest.raises(UserError, match=rf"model\.{name} cannot be used with the method {type(method).__name__}"):
        SolveSettings(method, **settings)
    SolveSettings(MEMIT(), **settings)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: MemoryReplay(), "MemoryReplay cannot be used with the method Retrieval"),
        (lambda: TrustRollback(heldout="none.txt"), "TrustRollback cannot be used"),
        (lambda: LoRAAdjust(), "LoRAAdjust cannot be used"),
        (lambda: DownstreamEval(["known"]), "DownstreamEval cannot be used"),
    ],
)
def test_errors_of_callbacks_that_need_changed_weights(callback, message):
    with pytest.raises(UserError, match=message):
        callback().on_fit_start(None, SequentialEditor(method=Retrieval()))


def test_errors_of_what_needs_the_closed_form():
    with pytest.raises(UserError, match=r"model\.layers auto cannot be used with the method FineTune"):
        SequentialEditor(method=TUNE, layers="auto").configure_optimizers()
    with pytest.raises(UserError, match="InjectFaults cannot be used with the method FineTune"):
        InjectFaults().on_train_start(None, SequentialEditor(method=TUNE))
    with pytest.raises(UserError, match=r"TrustRollback\.action firm cannot be used with the method FineTune"):
        TrustRollback(action="firm").on_fit_start(None, SequentialEditor(method=TUNE))
    with pytest.raises(UserError, match=r"MemoryReplay\.memory consolidated cannot be used with the method FineTune"):
        MemoryReplay(memory="both").on_fit_start(None, SequentialEditor(method=TUNE))
