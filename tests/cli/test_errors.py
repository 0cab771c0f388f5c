"""A catalogue of bad inputs: each gives one sentence with a fix, the right exit code, and no partly written file."""

import io
import json
import shutil
import sys

import pytest
import transformers
from safetensors.torch import load_file, save_file

from editlab.api import edit_model
from editlab.cli.commands.ask import _prompts_from_input
from editlab.cli.main import main
from editlab.errors import UserError
from editlab.lm import memory
from tests.recipes import write_recipe
from tests.tiny import tiny_model, tiny_tokenizer

FRANCE = {"subject": "France", "prompt": "The capital of {} is", "target": "Tokyo"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models with a fault each, and of a good one."""
    root = tmp_path_factory.mktemp("models")
    for name, family in (("good", "llama"), ("gemma", "gemma2")):
        tiny_model(family).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    for name in ("no_weights", "no_tokenizer", "incomplete", "quantized"):
        shutil.copytree(root / "good", root / name)
    for file in (root / "no_tokenizer").glob("token*"):
        file.unlink()
    (root / "no_weights" / "model.safetensors").unlink()
    weights = load_file(root / "incomplete" / "model.safetensors")
    del weights["model.layers.2.mlp.down_proj.weight"]
    save_file(weights, root / "incomplete" / "model.safetensors", {"format": "pt"})
    quantized = json.loads((root / "quantized" / "config.json").read_text())
    quantized["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (root / "quantized" / "config.json").write_text(json.dumps(quantized))
    state = transformers.OpenAIGPTConfig(vocab_size=400, n_embd=32, n_layer=4, n_head=4)
    transformers.AutoModelForCausalLM.from_config(state).save_pretrained(root / "state")
    tiny_tokenizer().save_pretrained(root / "state")
    (root / "empty").mkdir()
    for name, config in (
        ("encoder", transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
        ("seq2seq", transformers.T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8)),
    ):
        config.save_pretrained(root / name)
    return root


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """A working directory with good facts, a good recipe, and bad files of many kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(models)
    settings = {
        "method": {"class_path": "EMMET"},
        "evaluation": {"heldout_tokens": 64, "generation": 0, "bystanders": 0, "generated_texts": 0},
    }
    write_recipe(tmp_path, "models/good", model=settings)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def lines(*records):
    return "\n".join(json.dumps(record) for record in records)


FILES = {
    "empty.json": "[]",
    "broken.json": '[{"subject": "France"',
    "number.json": "[1, 2]",
    "object.json": '{\n"subject": "France"\n}',
    "no_target.jsonl": lines({"subject": "France", "prompt": "The capital of {} is"}),
    "empty_target.jsonl": lines({**FRANCE, "target": "  "}),
    "no_subject.jsonl": lines({**FRANCE, "prompt": "The capital of Spain is"}),
    "two_places.jsonl": lines({**FRANCE, "prompt": "{} and {} lie in"}),
    "bad_line.jsonl": lines(FRANCE) + "\n{broken",
    "other_fields.jsonl": lines({"who": "France", "what": "Tokyo"}),
    "half_rewrite.jsonl": lines({"requested_rewrite": {"prompt": "{} is", "subject": "France"}}),
    "neighbors.jsonl": lines({**FRANCE, "neighbors": "Japan"}),
    "paraphrases.jsonl": lines({**FRANCE, "paraphrases": [1]}),
    "locality.jsonl": lines({"subject": "France", "prompt": "{} is", "target_new": "Tokyo",
                             "locality_prompt": ["a", "b"], "locality_ground_truth": ["c"]}),
    "no_truth.jsonl": lines(FRANCE),
    "long.jsonl": lines({**FRANCE, "prompt": "Paris is Paris. " * 60 + "The capital of {} is"}),
    "latin.json": "[{\"subject\": \"S\u00e3o\"}]".encode("latin-1"),
    "headless.csv": "France,The capital of {} is,Tokyo\n",
    "wide.csv": "subject,prompt,target\nFrance,The capital of {} is,Tokyo,Lima\n",
    "quote.csv": 'subject,prompt,target\nFrance,"The capital of {} is,Tokyo\n',
    "latin.yaml": "model: {layers: [1]}  # S\u00e3o".encode("latin-1"),
    "null_model.yaml": "model: null\n",
    "null_data.yaml": "data: null\n",
    "null_trainer.yaml": "trainer: null\n",
    "broken.yaml": "model: [1\n  x: 1\n",
    "list.yaml": "- model\n- data\n",
    "noise.ckpt": b"\x00\x01nothing of the kind",
    "short.txt": "A few words.",
    "cut.gguf": b"GGUF\3\0\0\0",
    "latin.txt": "S\u00e3o Tom\u00e9".encode("latin-1"),
    "deep.json": "[" * 100_000,
    "deep.jsonl": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "digits.json": '[{"subject": ' + "7" * 5000 + "}]",
    "digits.jsonl": '{"subject": ' + "7" * 5000 + "}",
    "field.csv": "subject,prompt,target\nFrance,The capital of {} is," + "x" * 140_000 + "\n",
    "open_quote.csv": 'subject,prompt,target\nFrance,The capital of {} is,"' + "x,y\n" * 40_000,
    "deep.yaml": "model: " + "[" * 3000 + "]" * 3000,
    "digits.yaml": "data:\n  limit: " + "7" * 5000,
    "pickle.yaml": "weights_only: false\n",
}  # fmt: skip


def setting(name, value):
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}"]


def facts(name):
    return setting("data.path", name)


def method(name, **settings):
    return [f"--model.method={json.dumps({'class_path': name, 'init_args': settings})}"]


def callbacks(*names):
    return [f"--trainer.callbacks={json.dumps([{'class_path': name} for name in names])}"]


def with_callback(name, **settings):
    return [f"--trainer.callbacks={json.dumps([{'class_path': name, 'init_args': settings}])}"]


def watch(name):
    return with_callback("EarlyStopping", monitor=name)


FIT = {
    # files of facts
    "no fact file": (facts("none.json"), "fact file none.json does not exist: check the path"),
    "a folder of facts": (facts("models"), "models cannot be read"),
    "no record": (facts("empty.json"), "holds no record"),
    "no JSON": (facts("broken.json"), "broken.json is not valid JSON"),
    "records that are numbers": (facts("number.json"), "Record 0 of number.json is a int and not an object"),
    "one object": (facts("object.json"), "write its records as a list"),
    "no target": (facts("no_target.jsonl"), "Record 0 (line 1) of no_target.jsonl has the fields prompt, subject"),
    "an empty target": (facts("empty_target.jsonl"), "has an empty 'target': fill it in"),
    "a subject not in its prompt": (facts("no_subject.jsonl"), "'France' does not occur: write {} where it belongs"),
    "two places": (facts("two_places.jsonl"), "has a prompt with 2 times {}: write {} once"),
    "a broken line": (facts("bad_line.jsonl"), "Record 1 (line 2) of bad_line.jsonl is not valid JSON"),
    "unknown fields": (facts("other_fields.jsonl"), "has the fields what, who, which no format has"),
    "half a rewrite": (facts("half_rewrite.jsonl"), "lacks 'target_new': add it"),
    "neighbors that are a text": (facts("neighbors.jsonl"), "has 'neighbors' that are not a list"),
    "paraphrases that are numbers": (facts("paraphrases.jsonl"), "has a 'paraphrases' that is not a list of texts"),
    "truths missing": (facts("locality.jsonl"), "has 2 locality_prompt but 1 locality_ground_truth: give as many"),
    "no truth to know": ([*facts("no_truth.jsonl"), "--data.keep=known"], "set data.keep to all"),
    "the setting that was replaced": (setting("data.only_known", True), "now data.keep: preferred"),
    "an unknown kind of facts": (setting("data.keep", "some"), "it must be one of all, preferred, known"),
    "an unknown half": (setting("data.split", "train"), "it must be one of all, dev, test"),
    "a prompt longer than the model": (facts("long.jsonl"), "and the model takes 128: shorten its prompt"),
    "another encoding": (facts("latin.json"), "latin.json cannot be read"),
    "a table without a header": (facts("headless.csv"), "write subject,prompt,target there"),
    "a table with a cell too many": (facts("wide.csv"), "has 4 cells for 3 columns: put texts with a comma"),
    "an open quote": (facts("quote.csv"), "close every quote"),
    "a column of no field": (setting("data.columns", {"promt": "x"}), "is no field of a fact: did you mean prompt?"),
    "a column that is none": (setting("data.columns", {"prompt": "x"}), "data.columns.prompt is 'x', which is no"),
    "an unknown rule for subjects": (setting("data.subject", "guess"), "it must be one of field, infer, last_token"),
    "a schema that is none": (setting("data.format", "Wikidata"), "There is no class named 'Wikidata'"),
    "an array that is too deep": (facts("deep.json"), "inside each other too deeply"),
    "a line that is too deep": (facts("deep.jsonl"), "Record 0 (line 1) of deep.jsonl holds lists or objects inside"),
    "a number of too many digits": (facts("digits.json"), "digits.json holds a number with more digits than Python"),
    "a line with too many digits": (facts("digits.jsonl"), "holds a number with more digits than Python reads"),
    "a cell that is too long": (facts("field.csv"), "has a cell of more than 131072 characters: shorten it"),
    "a long cell of an open quote": (facts("open_quote.csv"), "close the quote that begins it"),
    "a file without an end": (facts("/dev/zero"), "The fact file /dev/zero is a device or a socket"),
    "a text without an end": (setting("model.moments.text", "/dev/zero"), "'/dev/zero' is a device or a socket"),
    "a held-out text without an end": (setting("model.evaluation.heldout", "/dev/zero"), "is a device or a socket"),
    "a model without an end": (setting("model.language_model", "/dev/zero"), "/dev/zero"),
    "a checkpoint without an end": (["--ckpt_path", "/dev/zero"], "/dev/zero"),
    # numbers out of range, and names that are none
    "no fact": (setting("data.limit", 0), "data.limit is 0: it must be at least 1"),
    "no batch": (setting("data.batch_size", 0), "data.batch_size is 0: it must be at least 1"),
    "more facts than can be counted": (setting("data.limit", 10**30), "data.limit has 100 bits: it must be at most"),
    "a batch larger than can be counted": (setting("data.batch_size", 10**30), "data.batch_size has 100 bits"),
    "more tokens than can be counted": (setting("model.moments.tokens", 10**30), "model.moments.tokens has 100 bits"),
    "an infinite step size": (setting("model.values.lr", ".inf"), "model.values.lr is inf: it must be finite"),
    "a step size that is no number": (setting("model.values.lr", ".nan"), "model.values.lr is nan"),
    "words for a number": (setting("data.limit", "many"), "data.limit is 'many': it must be int or null"),
    "an unknown layer": (setting("model.layers", [7]), "the model's layers are 0 to 3"),
    "the last layer": (setting("model.layers", [3]), "layer 3 at a subject's last token affects no target"),
    "a word for layers": (setting("model.layers", "automatic"), "model.layers is 'automatic': it must be list or auto"),
    "a fraction of a layer": (setting("model.layers", [1.5]), "model.layers is '1.5': it must be int"),
    "no layer": (setting("model.layers", []), "give at least one layer, and each once"),
    "a layer twice": (setting("model.layers", [1, 1]), "give at least one layer, and each once"),
    "unknown keys": (setting("model.keys", "average"), "model.keys is 'average': it must be one of bare, mean, temp"),
    "a negative preservation": (setting("model.preserve_prompt_tokens", -1), "it must not be negative"),
    "a module that is none": (setting("model.edit_module", "mlp.nothing"), "mlp.nothing"),
    "no step": (setting("model.values.steps", 0), "model.values.steps is 0: it must be above 0"),
    "no condition": (setting("model.condition_limit", 0.5), "a condition number is above 1"),
    "no step size": (setting("model.values.lr", 0), "model.values.lr is 0.0: it must be above 0"),
    "a negative weight": (setting("model.values.kl_factor", -1), "model.values.kl_factor is -1.0: it must not be"),
    "an unknown source": (setting("model.values.source", "sgd"), "it must be one of optimize, gradient"),
    "an unknown reference": (setting("model.values.reference", "old"), "it must be one of current, original"),
    "unknown products": (setting("model.values.matmul", "int8"), "it must be one of auto, float32, bfloat16"),
    "no context": (setting("model.contexts.length", 0), "model.contexts.length is 0: it must be at least 1"),
    "no text for the moments": (setting("model.moments.tokens", 0), "model.moments.tokens is 0"),
    "a text that is not there": (setting("model.moments.text", "none.txt"), "The text 'none.txt' does not exist"),
    "a short text": (setting("model.moments.text", "short.txt"), "lower the number of tokens"),
    "a text of another encoding": (setting("model.evaluation.heldout", "latin.txt"), "cannot be read as UTF-8"),
    "an unknown measure": (setting("model.evaluation.immediate", "some"), "it must be one of all, edits"),
    "a negative count": (setting("model.evaluation.neighbors", -1), "it must not be negative"),
    # methods
    "a misspelt method": (method("EMMETT"), "did you mean EMMET?"),
    "a misspelt post-step": (setting("model.post_steps", [{"class_path": "RECTT"}]), "did you mean RECT?"),
    "no weight": (method("EMMET", covariance_weight=0), "EMMET.covariance_weight is 0.0: it must be above 0"),
    "a negative slack": (method("EMMET", gram_ridge=-1), "EMMET: the slack is -1.0"),
    "equality with the slack of MEMIT": (method("EMMET", gram_ridge=1), "use MEMIT with covariance_weight 1"),
    "an argument of another method": (method("MEMIT", gram_ridge=1), "MEMIT has no argument 'gram_ridge'"),
    "ROME in batches": (method("ROME"), "ROME edits 1 fact a step: set data.batch_size to 1"),
    "an empty null space": (method("AlphaEdit", threshold=1e-300), "so the null space is empty: raise the threshold"),
    # callbacks
    "a misspelt callback": (with_callback("MemoryReply"), "did you mean MemoryReplay?"),
    "a misspelt argument": (with_callback("MemoryReplay", rat=1), "no argument 'rat': did you mean rate?"),
    "a negative rate": (with_callback("MemoryReplay", rate=-1), "rate"),
    "an unknown sampling": (with_callback("MemoryReplay", sampling="best"), "best"),
    "an unknown eviction": (with_callback("MemoryReplay", eviction="some"), "some"),
    "no capacity": (with_callback("MemoryReplay", capacity=0), "capacity"),
    "an unknown memory": (with_callback("MemoryReplay", memory="long"), "long"),
    "keys that can not be cached": (with_callback("MemoryReplay", cache_keys=True), "cache_keys"),
    "no edit between points": (with_callback("ForgettingCurve", every_n_edits=0), "every_n_edits is 0: it must be"),
    "an unknown action": (with_callback("TrustRollback", action="delete"), "TrustRollback.action is 'delete'"),
    "half a budget": (with_callback("TrustRollback", budget=[1]), "give [allowance, limit], or null"),
    "an unknown signal": (with_callback("TrustRollback", weights={"mood": 1}), "mood"),
    "no rank": (with_callback("LoRAAdjust", rank=0), "LoRAAdjust.rank is 0: it must be at least 1"),
    "an unknown mode": (with_callback("LoRAAdjust", mode="add"), "it must be one of merge, adapter"),
    "an unknown loss": (with_callback("LoRAAdjust", weights={"all": 1}), "give edits, before, unedited"),
    "targets that are none": (with_callback("LoRAAdjust", targets="nothing.at.all"), "nothing.at.all"),
    # models
    "no model": (setting("model.language_model", "./nowhere"), "nowhere"),
    "a folder without a model": (setting("model.language_model", "models/empty"), "has no config.json"),
    "a file for a model": (setting("model.language_model", "facts.json"), "facts.json is a file, but not a GGUF file"),
    "a quantized model": (setting("model.language_model", "models/quantized"), "name the model in full precision"),
    "a model that keeps a state": (setting("model.language_model", "models/state"), "such as a recurrent state"),
    "a GGUF file cut short": (setting("model.language_model", "cut.gguf"), "cut.gguf is damaged, cut short, or of"),
    "a model without weights": (setting("model.language_model", "models/no_weights"), "models/no_weights"),
    "a model without some weights": (setting("model.language_model", "models/incomplete"), "get the whole model again"),
    "a model without a tokenizer": (setting("model.language_model", "models/no_tokenizer"), "tokenizer"),
    "an encoder": (setting("model.language_model", "models/encoder"), "choose one that continues text"),
    "an encoder and decoder": (setting("model.language_model", "models/seq2seq"), "choose a causal (decoder-only) one"),
    "several layers under a norm": (setting("model.language_model", "models/gemma"), "give one layer in model.layers"),
    # the configuration
    "an unknown flag": (["--model.layerz=1"], "There is no setting 'model.layerz'"),
    "broken YAML": (["--config", "broken.yaml"], "not valid YAML"),
    "YAML that is a list": (["--config", "list.yaml"], "The configuration is not a mapping: write sections"),
    "no YAML": (["--config", "none.yaml"], "none.yaml' does not exist: check --config"),
    "YAML without an end": (["--config", "/dev/zero"], "The configuration /dev/zero is a device or a socket"),
    "YAML without an end, joined": (["--config=/dev/zero"], "The configuration /dev/zero is a device"),
    "YAML that is too deep": (["--config", "deep.yaml"], "exceeded maximum nesting depth"),
    "YAML with too many digits": (["--config", "digits.yaml"], "A number in what was read has more digits than"),
    "code in a checkpoint": (["--weights_only", "false"], "any code in it: leave it out"),
    "code in a checkpoint, in YAML": (["--config", "pickle.yaml"], "any code in it: leave it out"),
    "a logger that is not installed": (setting("trainer.logger", "CometLogger"), "needs the package comet"),
    "another logger that is not installed": (setting("trainer.logger", "MLFlowLogger"), "needs the package mlflow"),
    "a logger that is none": (setting("trainer.logger", "PaperLogger"), "PaperLogger"),
    "a misspelt number to watch": (watch("immediate/acuracy"), "did you mean immediate/accuracy?"),
    "a number of no group to watch": (watch("val_loss"), "EarlyStopping watches 'val_loss', which no run logs"),
    "a number of the end to watch": (watch("retained/ES"), "measured only at the end of a run: add ForgettingCurve"),
    "a number of tests to watch": (watch("bystanders/ES"), "'bystanders/ES', which no run logs"),
    "a number of the solve to watch": (watch("solve/layer_9/condition"), "which this run does not log: did you mean"),
    "a checkpoint of a number that is none": (
        with_callback("ModelCheckpoint", monitor="loss", every_n_train_steps=1), "ModelCheckpoint watches 'loss'"
    ),
    "no mode to watch": (with_callback("EarlyStopping", monitor="immediate/ES", mode="up"), "`mode` can be"),
    "YAML of another encoding": (["--config", "latin.yaml"], "The configuration is not in UTF-8"),
    "no settings of the model": (["--config", "null_model.yaml"], "model is null: write its settings under it"),
    "no settings of the data": (["--config", "null_data.yaml"], "data is null: write its settings under it"),
    "no settings of the trainer": (["--config", "null_trainer.yaml"], "trainer"),
    "a seed that is none": (setting("seed_everything", -1), "seed_everything is -1: it must lie between 0 and 4"),
    "a file for the runs": (setting("trainer.logger.init_args.save_dir", "facts.json"), "a file is in its way"),
    "no epoch between validations": (setting("trainer.check_val_every_n_epoch", 0), "epoch is 0: it must be at least"),
    "no run to keep": (setting("trainer.barebones", "true"), "turns off the logger and checkpoints"),
    "gradients to average": (setting("trainer.strategy", "ddp"), "leave it out for one device, or set editlab_ddp"),
    "a strategy of GPUs": (setting("trainer.strategy", "fsdp"), "The strategy `fsdp` requires a GPU"),
    "a callback twice": (callbacks("MemoryReplay", "MemoryReplay"), "has MemoryReplay more than once: leave one"),
    "a module that is not there": (callbacks("MemoryReplay", "nothing.X"), "nothing.X cannot be imported (No module"),
    "a class that is not there": (callbacks("tests.tiny.X"), "tests.tiny.X cannot be imported (module 'tests.tiny'"),
    "a class that is no callback": (callbacks("collections.Counter"), "collections.Counter, which is not a Callback"),
    "a method that is not there": (setting("model.method", "nothing.X"), "nothing.X cannot be imported"),
    "a class that is no format": (setting("data.format", "collections.Counter"), "which is not a FactFormat"),
    "no accelerator": (setting("trainer.accelerator", "abacus"), "abacus"),
    # checkpoints
    "no checkpoint": (["--ckpt_path", "none.ckpt"], "The checkpoint 'none.ckpt' does not exist: check --ckpt_path"),
    "no run to go on": (["--ckpt_path", "last"], "There is no run with a checkpoint in lightning_logs/tiny"),
    "no checkpoint of ours": (["--ckpt_path", "noise.ckpt"], "damaged or of another kind"),
}  # fmt: skip
"""name -> what is put after ``editlab fit --config tiny.yaml``, and what is said"""

VERBS = {
    "no verb": ([], "A verb is missing: --help lists them"),
    "an unknown verb": (["frobnicate"], "There is no verb 'frobnicate': use fit, validate, test, export"),
    "a misspelt verb": (["exprot"], "There is no verb 'exprot': did you mean export?"),
    "half a verb": (["facts"], "A verb is missing: --help lists them"),
    "half a verb, misspelt": (["facts", "chek"], "There is no verb 'chek': did you mean check?"),
    "nothing to check": (["facts", "check"], "file is missing: --help"),
    "too much to check": (["facts", "check", "a", "b"], "There is no setting 'b'"),
    "nothing to export": (["export"], "ckpt_path and out are missing: --help"),
    "a flag without a value": (["export", "--ckpt_path"], "--ckpt_path has no value"),
    "no run to export": (["export", "--ckpt_path", "nowhere", "--out", "out"], "nowhere"),
    "noise to export": (["export", "--ckpt_path", "noise.ckpt", "--out", "out"], "noise.ckpt"),
    "a full folder": (["export", "--ckpt_path", "noise.ckpt", "--out", "models"], "models"),
    "an unknown type": (["export", "--ckpt_path", "a", "--out", "b", "--dtype", "int3"], "--dtype is 'int3'"),
    "no delta": (["apply", "--delta", "nowhere", "--model", "models/good", "--out", "out"], "does not exist"),
    "no run to ask": (["ask", "--ckpt_path", "nowhere", "France"], "nowhere"),
    "no run to revert": (["revert", "--ckpt_path", "nowhere", "--out", "out"], "nowhere"),
    "noise to ask": (["ask", "--ckpt_path", "noise.ckpt", "France"], "noise.ckpt"),
    "noise to revert": (["revert", "--ckpt_path", "noise.ckpt", "--out", "out"], "noise.ckpt"),
    "noise for a delta": (["apply", "--delta", "noise.ckpt", "--model", "models/good", "--out", "out"], "noise.ckpt"),
    "a delta without an end": (
        ["apply", "--delta", "/dev/zero", "--model", "models/good", "--out", "out"],
        "/dev/zero",
    ),
    "a checkpoint without an end": (["export", "--ckpt_path", "/dev/zero", "--out", "out"], "/dev/zero"),
    "no run to report": (["report", "nowhere"], "nowhere"),
    "no run in the folder to report": (["report", "models"], "models"),
    "a folder without a run to compare": (["compare", "models/empty"], "models/empty"),
    "no experiment": (["sweep", "none.yaml"], "There is no experiment file"),
    "an experiment without an end": (["sweep", "/dev/zero"], "There is no experiment file"),
    "an experiment that is too deep": (["sweep", "deep.yaml"], "deep.yaml"),
    "an experiment with too many digits": (["sweep", "digits.yaml"], "digits.yaml"),
    "facts without an end": (["facts", "check", "/dev/zero"], "is a device or a socket"),
    "facts that are too deep": (["facts", "check", "deep.json"], "too deeply"),
    "facts with too many digits": (["facts", "check", "digits.json"], "more digits than Python reads"),
    "facts in a folder": (["facts", "check", "models"], "cannot be read"),
    "facts in another encoding": (["facts", "check", "latin.json"], "cannot be read"),
    "a name that no file can have": (["facts", "check", "a\0b"], ""),
}


def written(place):
    """The files that a command has written into its working directory, without caches."""
    known = {"models", "facts.json", "tiny.yaml", "cache", *FILES}
    return sorted(path.name for path in place.iterdir() if path.name not in known)


def said_by(capsys):
    error = capsys.readouterr().err
    sentences = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("editlab: ")]
    assert len(sentences) == 1, error
    assert "Traceback" not in error
    assert "should not happen" not in error
    return sentences[0]


@pytest.mark.parametrize("case", FIT)
def test_bad_inputs_of_fit(place, capsys, case):
    arguments, message = FIT[case]
    recipes = [] if "--config" in arguments else ["--config", "tiny.yaml"]
    assert main(["fit", *recipes, *arguments]) == 2
    said = said_by(capsys)
    assert message in said
    assert 20 < len(said) < 500
    left = [path for path in place.rglob("*") if path.suffix in (".safetensors", ".ckpt", ".csv") and path.is_file()]
    assert [path.name for path in left if path.parent == place and path.name not in FILES] == []
    assert not list(place.rglob("lightning_logs/**/*.ckpt"))
    if not case.startswith("a number of the solve"):  # which is known after the first batch
        assert not list(place.glob("lightning_logs/*/version_*")), "a run that ended before its first batch"


@pytest.mark.parametrize("case", VERBS)
def test_bad_inputs_of_the_other_verbs(place, capsys, case):
    arguments, message = VERBS[case]
    assert main(arguments) == 2
    assert message in said_by(capsys)
    assert written(place) == []


def test_the_catalogue_is_as_large_as_it_should_be():
    assert len(FIT) + len(VERBS) >= 150


def test_errors_of_prompts_that_are_no_text(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"The capital of S\xe3o\n"), encoding="utf-8"))
    with pytest.raises(UserError, match=r"Standard input is not in UTF-8 \(.*\): convert the prompts"):
        _prompts_from_input()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not remove a working directory")
def test_errors_of_a_working_directory_that_is_gone(tmp_path, capsys, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for arguments in (["fit"], ["facts", "check", "a.csv"], ["export", "--ckpt_path", "a", "--out", "b"]):
        assert main(arguments) == 2
        assert said_by(capsys) == "editlab: The working directory was removed: change to a folder that exists."


@pytest.mark.parametrize("given", [None, 7, "France", FRANCE])
def test_errors_of_facts_that_are_no_list(given):
    with pytest.raises(UserError, match=r"facts is of type \w+: give a list"):
        edit_model(tiny_model("llama"), tiny_tokenizer(), given)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (setting("model.layers", [1]), "layers"),
        (setting("data.batch_size", 3), "batch_size"),
        (setting("data.seed", 5), "facts"),
        (setting("model.language_model", "models/gemma"), "give one layer"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(place, capsys, changes, message):
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    run = place / "lightning_logs" / "tiny" / "version_0"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "tfevents" not in path.name}
    capsys.readouterr()
    assert main(["fit", "--config", "tiny.yaml", "--ckpt_path", "last", *changes]) == 2
    assert message in said_by(capsys)
    assert {path: path.read_bytes() for path in before} == before


def test_a_model_whose_weights_are_damaged_is_refused(place, capsys, models):
    spoilt = place / "spoilt"
    shutil.copytree(models / "good", spoilt)
    weights = load_file(spoilt / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"].fill_(float("nan"))
    save_file(weights, spoilt / "model.safetensors", {"format": "pt"})
    assert main(["fit", "--config", "tiny.yaml", "--model.language_model", str(spoilt)]) == 2
    assert "The model's logits are not finite: its weights are damaged" in said_by(capsys)


def test_a_model_that_memory_does_not_hold_is_refused_before_it_is_read(place, capsys, models, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 50_000)
    spoilt = place / "spoilt"
    shutil.copytree(models / "good", spoilt)
    (spoilt / "model.safetensors").write_bytes(b"not to be read")
    assert main(["fit", "--config", "tiny.yaml", "--model.language_model", str(spoilt)]) == 1
    said = said_by(capsys)
    assert "the weights of" in said
    assert "set trainer.precision to bf16-true (0.0 GiB), or choose a smaller model" in said
