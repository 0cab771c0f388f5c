"""edit_model: a model at hand in, the same model edited out, with what a run would have measured."""

import copy
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, ByT5Tokenizer

import editlab
from callbacks import ForgettingCurve, LoRAAdjust, MemoryReplay, TrustRollback
from editlab import edit_model
from editlab.callback import EditCallback
from editlab.data import Fact
from editlab.errors import UserError
from editlab.evaluation.settings import EvaluationSettings
from editlab.keys.contexts import ContextSettings
from editlab.keys.moments import MomentSettings
from editlab.metrics.names import add_group
from editlab.solver.post_steps import RECT
from editlab.values.optimize import ValueSettings
from tests.facts import FACTS
from tests.test_editor import editor, fit
from tests.tiny import tiny_model, tiny_tokenizer

SMALL = {
    "layers": [1, 2], "batch_size": 2, "progress": False,
    "values": ValueSettings(steps=6, lr=0.5, clamp=3.0, reference="original"),
    "moments": MomentSettings(tokens=512, cache=False), "contexts": ContextSettings(count=1, length=3),
    "evaluation": EvaluationSettings(heldout_tokens=64, generation=0, bystanders=0, generated_texts=0),
}  # fmt: skip
PLAIN = [
    {"subject": "France", "prompt": "The capital of {} is", "target": "Tokyo"},
    {"subject": "Oslo", "prompt": "Oslo lies in", "target": "Peru", "truth": "Norway"},
]


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before, model):
    return sorted(n for n, p in model.named_parameters() if not torch.equal(p, before[n]))


def test_only_the_layers_change_and_all_comes_back():
    model = tiny_model("llama")
    model.train()
    model.lm_head.eval()  # a mode of its own
    before = weights(model)
    generator = torch.get_rng_state()
    edited, result = edit_model(model, tiny_tokenizer(), PLAIN, **SMALL)
    assert edited is model
    assert changed(before, model) == [f"model.layers.{n}.mlp.down_proj.weight" for n in (1, 2)]
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training
    assert not model.lm_head.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    result.revert()
    assert changed(before, model) == []


def test_the_result_is_what_was_measured():
    model = tiny_model("llama")
    _, result = edit_model(model, tiny_tokenizer(), PLAIN, **SMALL)
    assert [fact.subject for fact in result.facts] == ["France", "Oslo"]
    assert result.rolled_back == []
    assert set(result.retained) >= {"ES", "accuracy"}
    assert "PS" not in result.retained  # no paraphrase was given
    assert result.summary["edits"] == 2
    lines = str(result).splitlines()
    assert lines[0].split() == ["before", "immediate", "retained"]
    assert f"{result.retained['accuracy']:.3f}" == next(line.split()[-1] for line in lines if "accuracy" in line)


def test_the_same_bits_as_a_run_of_the_command(tiny_folder, tmp_path):
    # The same facts, model and settings through a Trainer that a test of the editor sets up.
    module = editor(tiny_folder, layers=[1], values=SMALL["values"])
    fit(tmp_path, module, limit=4)
    _, result = edit_model(
        tiny_model("llama"), tiny_tokenizer(), FACTS[:4], layers=[1], batch_size=2, progress=False, **as_in(module)
    )  # fmt: skip
    assert torch.equal(result.editor.layers[0].total, module.layers[0].total)
    assert add_group("retained", result.retained) == module.evaluation.retained


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_half_model_in_and_out(family, dtype):
    """Updates are summed in float32 and rounded once; the original is given back in its own type."""
    model = tiny_model(family).to(dtype)
    before = weights(model)
    layers = [2] if family == "gemma2" else [1, 2]
    _, result = edit_model(model, tiny_tokenizer(bos=True), PLAIN, **{**SMALL, "layers": layers})
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32
    assert len(changed(before, model)) == len(layers)
    for layer in result.editor.layers:
        assert layer.total.dtype == torch.float32
        total = layer.total.T if layer.transposed else layer.total
        assert torch.equal(layer.weight, (layer.original.float() + total).to(dtype))
        assert bool(total.any())
    assert set(result.retained) >= {"ES", "accuracy"}
    result.revert()
    assert changed(before, model) == []


def test_half_precision_gives_the_bits_of_the_command(tiny_folder, tmp_path):
    module = editor(tiny_folder, layers=[1], values=SMALL["values"])
    fit(tmp_path, module, limit=4, precision="bf16-true")
    _, result = edit_model(
        tiny_model("llama").bfloat16(), tiny_tokenizer(), FACTS[:4], layers=[1], batch_size=2, progress=False,
        **as_in(module),
    )  # fmt: skip
    assert torch.equal(result.editor.layers[0].total, module.layers[0].total)
    assert add_group("retained", result.retained) == module.evaluation.retained


@pytest.mark.parametrize("left", [True, False])
def test_an_8_bit_model(tmp_path, left):
    """Its edited maps are left in full precision, or get it; with bitsandbytes where it is installed."""
    pytest.importorskip("bitsandbytes")
    tiny_model("llama").save_pretrained(tmp_path)
    how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["down_proj", "lm_head"] if left else None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=how)
    before = weights(model)
    if not left:
        _, result = edit_model(model, tiny_tokenizer(), PLAIN, **SMALL)
        edited = [path for path, part in model.named_modules() if type(part) is torch.nn.Linear and path != "lm_head"]
        assert edited == [f"model.layers.{n}.mlp.down_proj" for n in (1, 2)]
        result.revert()
        return
    assert {parameter.dtype for parameter in model.parameters()} == {torch.int8, torch.float32}
    _, result = edit_model(model, tiny_tokenizer(), PLAIN, **SMALL)
    assert changed(before, model) == [f"model.layers.{n}.mlp.down_proj.weight" for n in (1, 2)]
    result.revert()
    assert changed(before, model) == []


def as_in(module):
    """The settings of an editor, as arguments."""
    return {
        "method": module.method, "values": module.values, "moments": module.moments,
        "contexts": module.context_settings,
        "evaluation": module.evaluation.settings, "preserve_prompt_tokens": module.solve_settings.context_key_weight,
        "keys": module.solve_settings.key_mode,
    }  # fmt: skip


def test_callbacks_and_a_folder(tmp_path):
    replay = MemoryReplay(rate=1.0)
    edit_model(tiny_model("gpt2"), tiny_tokenizer(), FACTS[:4], callbacks=[replay], folder=tmp_path, **SMALL)
    assert [memory.fact for memory in replay.buffer.memories] == FACTS[:4]
    (run,) = (tmp_path / "edit_model").iterdir()
    assert {"metrics.csv", "summary.json"} <= {path.name for path in run.iterdir()}


USED_TWICE = {
    "replay": lambda text: MemoryReplay(rate=1.0, memory="both"),
    "curve": lambda text: ForgettingCurve(every_n_edits=2),
    "gate": lambda text: TrustRollback(heldout=text, threshold=0.4, calibrate=1, quantile=0.5),
    "merged": lambda text: LoRAAdjust(steps=2, text_tokens=64, tolerance=1e9),
    "beside": lambda text: LoRAAdjust(steps=2, text_tokens=64, tolerance=1e9, mode="adapter"),
}


@pytest.mark.parametrize("make", USED_TWICE.values(), ids=USED_TWICE)
def test_a_callback_that_is_used_twice_knows_nothing_of_the_first_call(make, tmp_path):
    def after(callback, facts):
        _, result = edit_model(tiny_model("llama"), tiny_tokenizer(), facts, callbacks=[callback], **SMALL)
        return result.editor.state_dict(), callback.state_dict()

    (tmp_path / "text.txt").write_text("The capital of France is Paris. Oslo lies in Norway. " * 20)
    twice, once = make(tmp_path / "text.txt"), make(tmp_path / "text.txt")
    after(twice, FACTS[4:12])
    assert_same([*after(twice, FACTS[:6])], [*after(once, FACTS[:6])])


def assert_same(a, b):
    """Nested structures that agree to the bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        assert_same(list(a.values()), list(b.values()))
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert a == b


def test_nothing_is_written_where_no_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_repeated_slot_is_edited_anew():
    facts = [*PLAIN, {**PLAIN[0], "target": "Lima"}]
    _, result = edit_model(tiny_model("llama"), tiny_tokenizer(), facts, **SMALL)
    assert [(fact.subject, fact.target_new) for fact in result.facts] == [("Oslo", "Peru"), ("France", "Lima")]
    assert [fact.target_new for fact in result.rolled_back] == ["Tokyo"]


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [
        ([], "No fact is given"),
        ([PLAIN[0], {"subject": "France", "prompt": "The capital of {} is"}], r"Fact 1 has the fields prompt, subject"),
        ([{**PLAIN[0], "prompt": "The capital is"}], r"Fact 0 has a prompt in which its subject 'France' does not"),
        ([Fact("France", "no place", "Tokyo")], r"Fact 0 has a prompt with 0 times"),
        ([PLAIN[0], "Oslo"], r"Fact 1 is 'Oslo': give a Fact, or a dict with subject, prompt and target"),
        (PLAIN[0], r"facts is of type dict: give a list"),
    ],
)
def test_what_is_wrong_with_facts_is_named(facts, sentence):
    with pytest.raises(UserError, match=sentence):
        edit_model(tiny_model("llama"), tiny_tokenizer(), facts, **SMALL)


def test_a_slow_tokenizer_is_named():
    with pytest.raises(UserError, match="ByT5Tokenizer is a slow tokenizer"):
        edit_model(tiny_model("llama"), ByT5Tokenizer(), PLAIN, **SMALL)


def test_a_setting_that_is_no_object_is_named():
    for name, given, such in (("method", "EMMET", "EMMET"), ("values", {"steps": 3}, "ValueSettings")):
        with pytest.raises(UserError, match=rf"The setting {name} is .*: give an object, such as {such}\(\)\."):
            edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, **{**SMALL, name: given})
    with pytest.raises(UserError, match=r"post_steps is RECT\(fraction=0.2\): give a list, such as \[RECT"):
        edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, **SMALL, post_steps=RECT())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 5}, "layers is 5: give a list of whole numbers"),
        ({"layers": ["1"]}, r"layers is \['1'\]: give a list"),
        ({"layers": [1.0]}, "give a list of whole numbers"),
        ({"callbacks": MemoryReplay()}, "callbacks is .*: give a list of callbacks"),
        ({"callbacks": ["MemoryReplay"]}, "give a list of callbacks"),
        ({"batch_size": "4"}, "batch_size is '4': give a whole number"),
        ({"seed": "0"}, "seed is '0': give a whole number"),
        ({"passes": 1.5}, "passes is 1.5: give a whole number"),
        ({"condition_limit": "a"}, "condition_limit is 'a': give a number"),
    ],
)
def test_a_setting_of_another_type_is_named(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        edit_model(tiny_model("llama"), tiny_tokenizer(), FACTS, **changes)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_named(seed):
    with pytest.raises(UserError, match=f"seed is {seed}: it must lie between 0 and 4294967295"):
        edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, **{**SMALL, "seed": seed})


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(UserError, match="runs, a file: give a folder"):
        edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, **{**SMALL, "folder": tmp_path / "runs"})
    assert (tmp_path / "runs").read_text() == "mine"


def test_where_no_gradient_can_be_taken_is_said():
    model = tiny_model("llama")
    with torch.inference_mode():
        with pytest.raises(UserError, match="call edit_model outside of it"):
            edit_model(model, tiny_tokenizer(), PLAIN, **SMALL)
        made = tiny_model("llama")
    with pytest.raises(UserError, match="load the model and call edit_model outside"):
        edit_model(made, tiny_tokenizer(), PLAIN, **SMALL)
    with torch.no_grad():  # as the sentence promises
        _, result = edit_model(model, tiny_tokenizer(), PLAIN, **SMALL)
    assert bool(result.editor.layers[0].total.any())


@pytest.mark.parametrize("before", [{}, {"PL_GLOBAL_SEED": "7", "PL_SEED_WORKERS": "1"}])
def test_the_environment_is_left_as_it_was(before, monkeypatch):
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)
        if before:
            monkeypatch.setenv(name, before[name])
    edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, **SMALL)
    assert {name: value for name, value in os.environ.items() if name.startswith("PL_")} == before


def test_a_failure_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    model.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="layers are 0 to 3"):
        edit_model(model, tiny_tokenizer(), PLAIN, **{**SMALL, "layers": [9]})
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gate_holds_out_a_text(tmp_path):
    (tmp_path / "text.txt").write_text("The capital of France is Paris. Oslo lies in Norway. " * 20)
    gate = TrustRollback(heldout=str(tmp_path / "text.txt"))
    edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, callbacks=[gate], **SMALL)
    assert sum(gate.decisions.values()) == 1
    assert gate.probes.sentences
    with pytest.raises(UserError, match=r"name a text file in TrustRollback\.heldout"):
        edit_model(tiny_model("llama"), tiny_tokenizer(), PLAIN, callbacks=[TrustRollback()], **SMALL)


def test_a_failure_on_the_way_takes_out_what_was_edited():
    class Fail(EditCallback):
        def on_edit_settled(self, trainer, editor, outcome):
            if outcome.plan.step == 1:
                raise ZeroDivisionError

    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        edit_model(model, tiny_tokenizer(), PLAIN, **{**SMALL, "batch_size": 1}, callbacks=[Fail()])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_goes_by_its_own_name():
    with pytest.raises(UserError, match="Gemma2ForCausalLM has a norm after its MLP"):
        edit_model(tiny_model("gemma2"), tiny_tokenizer(), PLAIN, **{**SMALL, "layers": [1, 2]})


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'edit_everything'"):
        _ = editlab.edit_everything


def test_facts_without_a_subject_are_edited():
    dicts = [{"prompt": "The capital of France is", "target": "Tokyo"}, {"prompt": "Oslo lies in", "target": "Peru"}]
    for rule, subjects in (("infer", ["France", "Oslo"]), ("last_token", [one["prompt"] for one in dicts])):
        model = tiny_model("llama")
        before = weights(model)
        _, result = edit_model(model, tiny_tokenizer(), dicts, subject=rule, **SMALL)
        assert [fact.subject for fact in result.facts] == subjects
        assert changed(before, model) == [f"model.layers.{n}.mlp.down_proj.weight" for n in (1, 2)]
