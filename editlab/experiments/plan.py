"""From an experiment to its runs: cases with all placeholders filled in, each with each seed."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from editlab.errors import UserError
from editlab.experiments.cells import CELLS, Cell, own_run
from editlab.experiments.csv_files import UNKNOWN
from editlab.experiments.launch import FAILED, LOCATION, Job
from editlab.experiments.provenance import JOINT, RECIPE_CONTENT, read_provenance
from editlab.experiments.spec import CallbackSpec, CaseSpec, Experiment, GridSpec, check_cases, first_existing
from editlab.runs.figures import Series
from editlab.runs.folders import RunFolder

_ORDER = (
    "data.path", "data.limit", "data.batch_size", "model.evaluation.immediate", "model.evaluation.neighbors",
    "model.evaluation.heldout", "model.evaluation.generated_texts", "model.moments.text", "model.moments.tokens",
)  # fmt: skip
"""Settings that come first on a run's command line: the digest of its settings depends on their order."""

_TOKENS = {"self": 24576}
_TOKENS_OF_TEXT = 160000


@dataclass(frozen=True)
class Options:
    """What is run, where, and how; None is as the experiment says."""

    only: Sequence[str] | None = None
    """names of cases"""
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """column of labels -> values of the cases that are run"""
    seeds: Sequence[int] | None = None
    edits: int | None = None
    batch_size: int | None = None
    facts: str | None = None
    heldout: str | None = None
    moments: str | None = None
    moment_tokens: int | None = None
    callback_settings: Sequence[tuple[str, str, Any]] = ()
    """(class, name, value): of callbacks in all cases that have them"""
    flags: Mapping[str, str] = field(default_factory=dict)
    """settings of all cases, over their own"""
    work: Path = Path()
    """folder of the runs"""
    out: Path = Path()
    """folder that ``results/`` and ``figs/`` lie in"""
    workers: int = 1
    launcher: str = "local"
    dry_run: bool = False
    no_run: bool = False
    archive: bool = False
    """whether settings, logs and outcomes of the runs are packed in ``logs/``"""


@dataclass(frozen=True)
class Case:
    """One configuration, without placeholders."""

    name: str
    flags: Mapping[str, Any]
    callbacks: Sequence[Mapping[str, Any]] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)

    def with_settings(self, settings: Iterable[tuple[str, str, Any]], flags: Mapping[str, Any]) -> Case:
        """The case with settings (class, name, value) of the callbacks that it has, and with flags over its own."""
        own: dict[str, dict[str, Any]] = {}
        for owner, name, value in settings:
            own.setdefault(owner, {})[name] = value
        callbacks = [
            {**one, "init_args": {**one.get("init_args", {}), **own.get(_class_name(one), {})}}
            for one in self.callbacks
        ]
        return replace(self, callbacks=callbacks, flags={**self.flags, **flags})

    def arguments(self, recipe: str, seed: int, work: Path) -> list[str]:
        """What ``editlab`` is called with for this case, one seed and one folder of runs."""
        flags = {"data.seed": seed, "seed_everything": seed, "trainer.enable_progress_bar": False, **self.flags}
        location = {"save_dir": str(work), "name": self.name, "version": f"version_{seed}"}
        # null first: jsonargparse would keep init_args of the recipe's callback of the same class.
        callbacks = ["--trainer.callbacks=null", f"--trainer.callbacks={json.dumps(list(self.callbacks))}"]
        settings = [*(f"--{name}={_text(value)}" for name, value in flags.items()), *callbacks]
        return [
            "fit",
            "--config",
            recipe,
            *settings,
            *(f"{LOCATION}{name}={value}" for name, value in location.items()),
        ]


@dataclass(frozen=True)
class Run:
    """One case with one seed, and its folder."""

    case: Case
    seed: int
    folder: Path
    recipe: str = ""
    project: Path = Path()

    @property
    def status(self) -> str:
        """``done``, ``failed`` or ``to run``."""
        if self.summary is not None:
            return "done"
        return "failed" if (self.folder / FAILED).exists() else "to run"

    @property
    def summary(self) -> dict[str, Any] | None:
        """The run's ``summary.json``; None if it has not finished."""
        return RunFolder(self.folder).summary

    @property
    def metrics(self) -> dict[str, float]:
        """Its metrics by name, ``retained/ES``, without those that are not finite."""
        return {name: v for name, v in ((self.summary or {}).get("metrics") or {}).items() if v is not None}

    @property
    def curve(self) -> Series:
        """The run's ``metrics.csv``: number of edits -> name -> value."""
        return RunFolder(self.folder).curve

    @property
    def started(self) -> bool:
        """Whether it has finished, or would resume from a checkpoint."""
        return self.summary is not None or (self.folder / "checkpoints" / "last.ckpt").exists()

    @property
    def settings_differ(self) -> bool:
        """Whether it was started with other settings than it would be now, as far as these were recorded."""
        if not self.started:
            return False
        noted, job = read_provenance(self.folder), self.job(1)
        pairs = (("settings", job.settings), (RECIPE_CONTENT, job.recipe_content))
        known = [({*noted.get(name, UNKNOWN).split(JOINT)} - {UNKNOWN}, now) for name, now in pairs]
        return any(then and then != {now} for then, now in known)

    def job(self, threads: int) -> Job:
        """What starts or resumes it on some cores."""
        folder = self.folder.absolute()
        arguments = self.case.arguments(self.recipe, self.seed, folder.parents[1])
        return Job(folder, tuple(arguments), threads, self.project)


def _class_name(callback: Mapping[str, Any]) -> str:
    return str(callback["class_path"]).rpartition(".")[2]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---- cases of an experiment -----------------------------------------------------------------------------------------


def variables(experiment: Experiment, options: Options) -> dict[str, Any]:
    """Quantities of an experiment that placeholders stand for, the seed apart; None if the recipe decides."""
    moments = options.moments or first_existing(experiment.moments, experiment.project)
    tokens = options.moment_tokens or experiment.moment_tokens
    if tokens is None and moments is not None:
        tokens = _TOKENS.get(moments, _TOKENS_OF_TEXT)
    facts = experiment.facts
    return {
        "edits": options.edits or experiment.edits,
        "batch_size": options.batch_size or experiment.batch_size,
        "facts": options.facts or (first_existing((facts,), experiment.project) if facts else None),
        "heldout": options.heldout or first_existing(experiment.heldout, experiment.project),
        "moments": moments,
        "moment_tokens": tokens,
    }


def common_flags(experiment: Experiment, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of all cases, below their own."""
    names = {"facts": "data.path", "edits": "data.limit", "batch_size": "data.batch_size",
             "heldout": "model.evaluation.heldout", "moments": "model.moments.text",
             "moment_tokens": "model.moments.tokens"}  # fmt: skip
    flags = {flag: values[name] for name, flag in names.items() if values[name] is not None}
    flags |= experiment.flags
    return {name: flags[name] for name in (*_ORDER, *flags) if name in flags}


def cases(experiment: Experiment, options: Options, seed: int) -> list[Case]:
    """All cases with the placeholders filled in for one seed, the ones that matter most first.

    Raises:
        UserError: for a placeholder that stands for nothing, or a reference to a case that does not exist.
    """
    values = {**variables(experiment, options), "seed": seed}
    common = common_flags(experiment, values)
    found = {name: _case(experiment, name, spec, common, values) for name, spec in experiment.cases.items()}
    cells = list(all_cells(experiment, options, seed))
    for _, cell, case in cells:
        if cell.possible:
            found.setdefault(case.name, case)
    check_cases(experiment, [*found, *(case.name for _, _, case in cells)])
    return list(found.values())


def all_cells(experiment: Experiment, options: Options, seed: int) -> Iterator[tuple[GridSpec, Cell, Case]]:
    """Every cell of every grid, and the case that it is read from."""
    values = {**variables(experiment, options), "seed": seed}
    common = common_flags(experiment, values)
    for grid in experiment.grids:
        for cell in grid_cells(grid, values["edits"]):
            yield grid, cell, cell_case(experiment, grid, cell, common, values)


def grid_cells(grid: GridSpec, edits: int | None) -> list[Cell]:
    """All combinations of a grid's axes."""
    function = own_run if grid.cells is None else CELLS.get(grid.cells) or load_function(grid.cells)
    names = list(grid.axes)
    return [function(dict(zip(names, combination, strict=True)), edits) for combination in product(*grid.axes.values())]


def cell_case(
    experiment: Experiment, grid: GridSpec, cell: Cell, common: Mapping[str, Any], values: Mapping[str, Any]
) -> Case:
    """The case that a cell is read from."""
    spec = CaseSpec(grid.flags, grid.callbacks, grid.labels)
    try:
        name = grid.name.format_map(cell.run)
    except (KeyError, ValueError, IndexError) as error:
        axes = ", ".join(grid.axes)
        raise UserError(f"{experiment.path}: the name {grid.name!r} of a grid must be of its axes {axes}.") from error
    return _case(experiment, name, spec, common, {**values, **cell.run})


def _case(
    experiment: Experiment, name: str, spec: CaseSpec, common: Mapping[str, Any], values: Mapping[str, Any]
) -> Case:
    where = f"{experiment.path}: {name}"
    callbacks = [_callback(one, values, where) for one in spec.callbacks if _wanted(one, values, where)]
    repeated = {
        setting: one["init_args"][setting]
        for one in callbacks
        for setting in experiment.label_settings.get(_class_name(one), ())
        if setting in one["init_args"]
    }
    labels = {**repeated, **fill(spec.labels, values, where)}
    return Case(name, fill({**common, **spec.flags}, values, where), callbacks, labels)


def _callback(spec: CallbackSpec, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"class_path": spec.class_path, "init_args": fill(dict(spec.init_args), values, where)}


def _wanted(spec: CallbackSpec, values: Mapping[str, Any], where: str) -> bool:
    when = fill(spec.when, values, where)
    return bool(when) and when != "none"


def fill(value: Any, values: Mapping[str, Any], where: str) -> Any:
    """A value with its placeholders replaced, in nested lists and mappings too.

    Raises:
        UserError: for a placeholder that stands for nothing.
    """
    if isinstance(value, Mapping):
        return {key: fill(one, values, where) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [fill(one, values, where) for one in value]
    found = re.fullmatch(r"\{(\w+)\}", value) if isinstance(value, str) else None
    if found is None:
        return value
    if values.get(found[1]) is None:
        known = ", ".join(name for name, one in values.items() if one is not None)
        raise UserError(f"{where}: {value} stands for nothing: use one of {known}, or set {found[1]} in the file.")
    return values[found[1]]


def load_function(path: str) -> Any:
    """A function by its import path.

    Raises:
        UserError: if there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"There is no function {path!r}: correct its import path in the experiment's file.") from error


# ---- runs -----------------------------------------------------------------------------------------------------------


def planned(experiment: Experiment, options: Options) -> list[Run]:
    """Every case that is asked for with every seed, finished or not.

    Raises:
        UserError: if there is no case of a name, or of labels, that are asked for.
    """
    runs: list[Run] = []
    for seed in dict.fromkeys(options.seeds or experiment.seeds):
        every = cases(experiment, options, seed)
        names = [case.name for case in every]
        unknown = sorted({*(options.only or ())} - {*names})
        if unknown:
            raise UserError(f"There is no case {', '.join(unknown)}: there are {', '.join(names)}.")
        labels: dict[str, list[Mapping[str, Any]]] = {case.name: [case.labels] for case in every}
        for _, cell, case in all_cells(experiment, options, seed):
            labels.setdefault(case.name, []).append(cell.axes)
        chosen = [case for case in every if not options.only or case.name in options.only]
        chosen = [case for case in chosen if any(_has_labels(one, options.where) for one in labels[case.name])]
        if not chosen:
            raise UserError("No case has the labels that --where asks for: leave it out, and see them in the tables.")
        runs += [_run(experiment, case, options, seed) for case in chosen]
    return runs


def _has_labels(labels: Mapping[str, Any], wanted: Mapping[str, Sequence[str]]) -> bool:
    """Whether labels have one of the wanted values in each of the wanted columns."""
    return all(name in labels and _in(labels[name], values) for name, values in wanted.items())


def _in(value: Any, wanted: Sequence[str]) -> bool:
    """Whether a label is one of some values from the command line; 0 and 0.0 are alike."""
    return any(_alike(value, one) for one in wanted)


def _alike(value: Any, text: str) -> bool:
    try:
        return float(value) == float(text)
    except (TypeError, ValueError):  # a list, null, or a word
        return str(value) == text


def _run(experiment: Experiment, case: Case, options: Options, seed: int) -> Run:
    folder = options.work / case.name / f"version_{seed}"
    chosen = case.with_settings(options.callback_settings, options.flags)
    return Run(chosen, seed, folder, experiment.recipe, experiment.project)


def finished(experiment: Experiment, options: Options) -> list[Run]:
    """Every finished run of the experiment in the folder of the runs, whether asked for or not."""
    folders = (re.fullmatch(r"version_(\d+)", path.name) for path in options.work.glob("*/version_*"))
    seeds = sorted({int(found[1]) for found in folders if found})
    if not seeds:
        return []
    every = planned(experiment, replace(options, only=None, where={}, seeds=seeds))
    return [run for run in every if run.summary is not None]
