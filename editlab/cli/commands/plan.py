"""``editlab plan``: chooses settings for N edits from a dry solve, and says what to expect of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from editlab.cli.commands.command import Command
from editlab.cli.planned_recipe import (
    REPLAY,
    class_name,
    planned,
    read_recipe,
    require_new_file,
    write_recipe,
)
from editlab.errors import UserError
from editlab.utils import shipped
from editlab.utils.validation import at_least_one

if TYPE_CHECKING:
    from editlab.data.fact import Fact
    from editlab.editor import SequentialEditor

log = logging.getLogger(__name__)

HARMLESS = (REPLAY, "ForgettingCurve", "DownstreamEval", "EditProgressBar", "EditCheckpoint", "ModelCheckpoint")
"""Callbacks that the plan replaces, or that change no weight."""


def _add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--edits", type=int, required=True, help="Number of facts to edit.")
    add("--budget", type=float, default=1.1, help="Largest perplexity after the edits, as a ratio to that before.")
    add("--config", help="A recipe of editlab fit, whose model, facts, batch size and highest layer are taken.")
    add("--model", help="The model, as --model.language_model of editlab fit.")
    add("--path", help="The facts, as --data.path of editlab fit.")
    add("--set", nargs="+", type=str, metavar="NAME=VALUE", help="Other settings of editlab fit, such as "
        "data.batch_size=32.")  # fmt: skip
    add("--out", help="A new file for a recipe with the chosen settings, which editlab fit --config runs.")


def _plan(given: Namespace) -> None:
    at_least_one("plan", edits=given.edits)
    if not given.budget > 1:
        raise UserError(
            f"--budget is {given.budget:g}: edits do not lower the perplexity, so give a ratio above 1, such as 1.1."
        )
    require_new_file(given.out)
    recipe, settings = read_recipe(None if given.config is None else shipped.chosen(given.config)), _settings(given)

    from editlab.cli.plan_report import report
    from editlab.edits.calibration import Calibration
    from editlab.edits.forecast import FactSample
    from editlab.edits.planning import MOST_FORECASTS, Search, layer_sets
    from editlab.lm.fingerprint import fingerprint
    from editlab.utils.progress import progress

    flags = [*(["--config", given.config] if given.config else []), *(f"--{n}={value}" for n, value in settings)]
    # By name, as verbs themselves are loaded: that module needs the list of verbs, of which this is one.
    cli = import_module("editlab.cli.training").without_run(flags)
    editor, data = cli.model, cli.datamodule
    require_described(editor)
    laws = Calibration.load()
    with cli.trainer.precision_plugin.module_init_context():
        editor.configure_model()
    editor.lm.anatomy.require_one_map("editlab plan")
    if editor.device_map is None:
        editor.lm.model.to(cli.trainer.strategy.root_device)
    facts = facts_of(editor, data, given.edits)
    own = editor.layer_numbers or editor.find_layers(data.facts_to_try(20))
    sets = layer_sets(editor.lm.anatomy.editable, own, editor.lm.anatomy.additive and editor.site_setting != "mlp")
    layers = sorted({layer for some in sets for layer in some})
    sample = FactSample.measure(
        editor.lm, editor.language_model, facts, given.edits, layers, editor.site_setting, editor.values,
        editor.context_settings, editor.moments,
    )  # fmt: skip
    calibrated = fingerprint(editor.lm.model) == laws.fingerprint
    with progress(total=MOST_FORECASTS, desc="Forecasts", unit="setting") as bar:
        search = Search(sample, laws, data.batch_size, laws.perplexity.harm(given.budget), lambda _: bar.update())
        chosen = search.choose(sets)
    name = f"{given.edits} edits of {data.path} in {editor.language_model}"
    lines = report(name, sample, search, chosen, given.budget, calibrated)
    for line in lines:
        log.info("%s", line)
    for line in notes(recipe, editor):
        log.info("%s", line)
    if given.out is not None:
        values = [(setting, yaml.safe_load(value)) for setting, value in settings]
        write_recipe(Path(given.out), planned(recipe, values, chosen.candidate, given.edits), lines[:4])
        log.info("Recipe: %s. Run it by: editlab fit --config %s", given.out, given.out)


def _settings(given: Namespace) -> list[tuple[str, str]]:
    """Names and values of the settings of ``fit`` that were given, as texts."""
    found = [("model.language_model", given.model), ("data.path", given.path)]
    settings = [(name, str(value)) for name, value in found if value is not None]
    for text in given.set or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"--set {text!r} must have the form NAME=VALUE, such as data.batch_size=32.")
        settings.append((name, value))
    return settings


def require_described(editor: SequentialEditor) -> None:
    """Refuses settings of a recipe whose runs a dry solve does not describe.

    Raises:
        UserError: One of them is set.
    """
    solve, values = editor.solve_settings, editor.values
    for wrong, name, why in (
        (solve.key_mode != "bare", "model.keys", "it reads keys in the bare prompt: set bare"),
        (solve.passes > 1, "model.passes", "it solves one pass: set 1"),
        (bool(solve.post_steps), "model.post_steps", "it has no post-steps: remove them"),
        (values.source != "optimize", "model.values.source", "residuals of the search are what it knows: set optimize"),
        (values.spread != "residual", "model.values.spread", "layers share one residual: set residual"),
        (bool(values.anchor_facts), "model.values.anchor_facts", "values keep their norm: set 0"),
        (editor.restore_between_batches, "model.restore_between_batches", "batches are a sequence: set false"),
    ):
        if wrong:
            raise UserError(f"{name} is not as editlab plan assumes: {why}.")


def facts_of(editor: SequentialEditor, data: Any, edits: int) -> list[Fact]:
    """The first facts of the run's order that fit the model, up to the number of edits.

    Which of them ``data.keep`` keeps is not measured, as keys do not depend on it.

    Raises:
        UserError: The file cannot be read, or has no fact that fits the model.
    """
    from editlab.data.chat import as_edited

    data.setup()
    editor.lm.joint, data.fault = data.joint, editor.too_long
    data.candidates = as_edited(data.candidates, editor.lm.chat)
    facts = list(islice(data.fitting(data.candidates), edits))
    if not facts:
        raise UserError(f"None of the facts in {data.path} fits the model: shorten them.")
    return facts


NO_MATTER = ("batch_tokens", "matmul", "kl_at")
"""Settings of the search for values that hardly change one, or (``kl_at``) that the model's conventions give."""


def notes(recipe: dict[str, Any], editor: SequentialEditor) -> Sequence[str]:
    """What of the recipe is replaced, or is not part of the forecast, in a sentence each."""
    from editlab.values.settings import ValueSettings

    found = []
    method = type(editor.method).__name__
    if recipe and method != "MEMIT":
        found.append(f"The recipe's method {method} is replaced by MEMIT, the one that is forecast.")
    given = (recipe.get("model") or {}).get("method")
    arguments = given.get("init_args") if isinstance(given, dict) else None
    if method == "MEMIT" and (lost := sorted({*(arguments or {})} - {"covariance_weight"})):
        found.append(f"Not part of the forecast, and left out of the recipe: {', '.join(lost)} of MEMIT.")
    usual = ValueSettings(reference=editor.values.reference)
    changed = [one.name for one in fields(usual) if getattr(editor.values, one.name) != getattr(usual, one.name)]
    if changed := [name for name in changed if name not in NO_MATTER]:
        found.append(
            f"The laws were calibrated on the default search for values; of another one ({', '.join(changed)}) edits "
            "may reach less of their targets than is forecast."
        )
    given = (recipe.get("trainer") or {}).get("callbacks") or []
    others = [class_name(one) for one in (given if isinstance(given, list) else [given])]
    if changing := [name for name in others if name not in HARMLESS]:
        found.append(f"Not part of the forecast, and kept in the recipe: {', '.join(changing)}.")
    return found


COMMAND = Command("plan", "Choose settings for a number of edits, and say what to expect.", _add_arguments, _plan)
