"""The schema of an experiment's YAML file (``configs/experiments/*.yaml``, or a user's own).

An experiment is a recipe and cases that override settings of it, each run with several seeds; tables and figures say
what is made of the finished runs. The smallest one:

.. code-block:: yaml

    recipe: configs/emmet_replay.yaml
    cases:
      plain: {callbacks: []}
      replay: {callbacks: [{class_path: MemoryReplay, init_args: {rate: 0.3}}]}
    tables: [{file: replay.csv, rows: runs}]

A value that is ``"{edits}"`` as a whole (or ``{seed}``, ``{batch_size}``, ``{facts}``, ``{heldout}``, ``{moments}``) is
replaced by that quantity, with its type; in a grid, names of the grid's axes may stand so too.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from editlab.errors import UserError
from editlab.experiments.content import experiment_file, read_content
from editlab.experiments.figure_spec import BarsSpec, CurvesSpec, FigureSpec, FrontierSpec
from editlab.experiments.schema import build
from editlab.runs.outcomes import MEASURES
from editlab.utils.shipped import EXPERIMENTS, RECIPES, find, in_checkout, shipped_folder


@dataclass(frozen=True)
class CallbackSpec:
    """A callback of a case."""

    class_path: str
    """its class, by bare name or full path, as in a recipe"""
    init_args: Mapping[str, Any] = field(default_factory=dict)
    when: Any = True
    """the callback is left out if this is 0, false or ``none``; for axes of a grid"""


@dataclass(frozen=True)
class CaseSpec:
    """One configuration: overrides of the recipe."""

    flags: Mapping[str, Any] = field(default_factory=dict)
    """setting -> value, as on the command line: ``model.layers``; over those of the experiment"""
    callbacks: tuple[CallbackSpec, ...] = ()
    """all callbacks of the case: those of the recipe do not count"""
    labels: Mapping[str, Any] = field(default_factory=dict)
    """columns of the tables that say what the case is"""


@dataclass(frozen=True)
class GridSpec:
    """Cases for all combinations of some values; the first axis changes slowest."""

    name: str
    """of a case: ``"{sampling}_{rate}_{capacity}"``; a name that ``cases`` has already is left out"""
    axes: Mapping[str, tuple[Any, ...]]
    flags: Mapping[str, Any] = field(default_factory=dict)
    callbacks: tuple[CallbackSpec, ...] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
    cells: str | None = None
    """which run a cell is read from: a function of :data:`editlab.experiments.cells.CELLS`, or its import path"""


@dataclass(frozen=True)
class CompareSpec:
    """A comparison of all cases of a table of means with one of them, by the outcomes of their edits."""

    baseline: str
    """the case that is subtracted"""
    metric: str = "accuracy"
    """a name in :data:`editlab.runs.outcomes.MEASURES`"""
    group: Literal["before", "immediate", "retained"] = "retained"
    """when the outcomes were measured"""


@dataclass(frozen=True)
class TableSpec:
    """A CSV file in ``results/``."""

    file: str
    rows: str
    """what a row is: ``runs``, ``means``, ``snapshots``, ``turns``, ``cells``, or the import path of a function"""
    columns: tuple[str, ...] = ()
    """further columns of ``runs`` and ``cells``: names in :data:`editlab.experiments.tables.COLUMNS`"""
    where: Mapping[str, Any] = field(default_factory=dict)
    """column -> value of the rows that are taken; ``runs`` alone"""
    against: str | None = None
    """of ``means``: the case that others are compared with"""
    baselines: Mapping[str, str] = field(default_factory=dict)
    """of ``means``: case -> another case that it is compared with"""
    compare: CompareSpec | None = None
    """of ``means``: adds the differences from a baseline, paired over seeds and facts, and marks those that survive"""


@dataclass(frozen=True)
class CopySpec:
    """A file of one run's folder that is copied to ``results/``: of the first seed."""

    file: str
    case: str


@dataclass(frozen=True)
class QuickSpec:
    """What ``--quick`` runs: a few small cases, to see that everything works."""

    only: tuple[str, ...]
    edits: int = 16
    batch_size: int | None = None


@dataclass(frozen=True)
class Experiment:
    """A whole experiment; ``None`` leaves a setting as the recipe has it."""

    recipe: str
    """its recipe, relative to the experiment's folder or one above it, or else to the current folder; or the name of a
    recipe that ships with editlab"""
    cases: Mapping[str, CaseSpec] = field(default_factory=dict)
    """name -> case, the ones that matter most first"""
    grids: tuple[GridSpec, ...] = ()
    question: str = ""
    """what the experiment asks, in a sentence"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """of the data and of all else that is random"""
    edits: int | None = None
    batch_size: int | None = None
    facts: str | None = None
    """file of facts, or ``worldfacts``"""
    heldout: tuple[str, ...] = ()
    """texts of the perplexity: the first file that exists, or ``builtin``"""
    moments: tuple[str, ...] = ()
    """texts of the second moments: the first file that exists, or ``self``"""
    moment_tokens: int | None = None
    """tokens of that text; default: 24,576 of the model's own text, 160,000 of others"""
    flags: Mapping[str, Any] = field(default_factory=dict)
    """settings of all cases, over the recipe's"""
    label_settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """class of a callback -> settings of it that become labels of the cases that give them"""
    tables: tuple[TableSpec, ...] = ()
    copies: tuple[CopySpec, ...] = ()
    figures: tuple[FigureSpec, ...] = ()
    quick: QuickSpec | None = None
    like: str | None = None
    """another experiment, by path or name: its keys count where they are not given, and flags are added to its flags"""
    definitions: Any = None
    """holds YAML anchors that other parts refer to"""
    path: Path = field(default=Path(), init=False)
    """its file"""
    project: Path = field(default=Path(), init=False)
    """folder that runs start in: relative paths in settings count from there"""

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def load_experiment(path: str | Path) -> Experiment:
    """Reads and checks an experiment's file.

    Args:
        path: the file, or the name of an experiment that ships with editlab, whose runs start in the current folder.

    Raises:
        UserError: if it does not exist, is no valid YAML, has a wrong key, type or value, or names a recipe that does
            not exist.
    """
    file = experiment_file(path)
    content = read_content(file, str(path))
    experiment = build(Experiment, content, str(path))
    one = find(str(path), (EXPERIMENTS,))
    by_name = one is not None and file == one.path != Path(path).expanduser()
    file = file.resolve()
    object.__setattr__(experiment, "path", file)
    object.__setattr__(experiment, "project", _project(experiment.recipe, file, str(path), by_name))
    _check(experiment, str(path))
    _require_own_logger(_recipe_file(experiment), str(path))
    return experiment


def _project(recipe: str, file: Path, where: str, by_name: bool) -> Path:
    """The folder that the recipe's path counts from, and that runs start in."""
    # One that ships belongs to no project, unless it is named by its path in a checkout.
    travels = file.is_relative_to(shipped_folder()) and (by_name or not in_checkout())
    for folder in () if travels else (*file.parents, Path.cwd()):
        if (folder / recipe).is_file() or (folder / f"{recipe}.yaml").is_file():
            return folder
    if find(recipe, (RECIPES,)) is not None:
        return Path.cwd() if travels else file.parent
    raise UserError(
        f"{where}: there is no recipe {recipe!r} in {file.parent}, in a folder above it, or in the current folder: "
        "correct its path, or name one that editlab ls recipes lists."
    )


def _recipe_file(experiment: Experiment) -> Path:
    """The file of the recipe: in the project, or one that ships."""
    named = experiment.project / experiment.recipe
    for file in (named, named.with_name(f"{named.name}.yaml")):
        if file.is_file():
            return file
    one = find(experiment.recipe, (RECIPES,))
    assert one is not None, experiment.recipe  # otherwise there is no project
    return one.path


_LOGGERS = ("RunLogger", "CSVRunLogger")
"""Loggers through whose settings a sweep chooses the folder of each run."""


def _require_own_logger(recipe: Path, where: str) -> None:
    """Refuse a recipe whose logger does not choose the run's folder; a recipe that is no YAML is reported by its run.

    Raises:
        UserError: Its logger is of another package, or it has several.
    """
    try:
        content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return
    trainer = content.get("trainer") if isinstance(content, Mapping) else None
    logger = trainer.get("logger") if isinstance(trainer, Mapping) else None
    name = logger.get("class_path") if isinstance(logger, Mapping) else logger
    if logger is not None and str(name).rpartition(".")[2] not in _LOGGERS:
        raise UserError(
            f"{where}: the recipe {recipe.name} has trainer.logger, and a sweep chooses each run's folder by one "
            f"{' or '.join(_LOGGERS)}: leave trainer.logger out of the recipe."
        )


def _check(experiment: Experiment, where: str) -> None:
    """What types alone do not tell.

    Raises:
        UserError: for cases, columns or tables that others refer to and that do not exist.
    """
    if not experiment.cases and not experiment.grids:
        raise UserError(f"{where} has no cases: add at least one under 'cases' or 'grids'.")
    if not experiment.seeds:
        raise UserError(f"{where}: seeds is empty: give at least one.")
    for name in ("edits", "batch_size", "moment_tokens"):
        number = getattr(experiment, name)
        if number is not None and number < 1:
            raise UserError(f"{where}: {name} must be at least 1, and is {number}.")
    kinds: set[str] = set()
    for table in experiment.tables:
        needed = {"means": {"runs"}, "turns": {"runs", "snapshots"}}.get(table.rows, set()) - kinds
        if needed:
            raise UserError(f"{where}: the table {table.file} needs a table of {min(needed)} above it: add one.")
        kinds.add(table.rows)
    files = {table.file for table in experiment.tables}
    for figure in experiment.figures:
        table_file = getattr(figure, "table", None)
        if table_file is not None and table_file not in files:
            raise UserError(
                f"{where}: the figure {figure.file} is of {table_file}, which is no file under 'tables': "
                f"there are {', '.join(sorted(files)) or 'none'}."
            )


def check_cases(experiment: Experiment, names: Collection[str]) -> None:
    """Checks that cases which tables and figures refer to are among those there are.

    Raises:
        UserError: for one that is not.
    """
    referred: list[tuple[str, str]] = []
    for table in experiment.tables:
        pairs = [*table.baselines, *table.baselines.values(), *([table.against] if table.against else [])]
        referred += [(case, f"the table {table.file}") for case in pairs]
        if table.compare is not None:
            referred.append((table.compare.baseline, f"the comparison of the table {table.file}"))
            _check_comparison(table, table.compare, f"{experiment.path}: the table {table.file}")
        if table.rows == "means" and table.against is None:
            raise UserError(f"{experiment.path}: the table {table.file} of means needs 'against': name a case there.")
    referred += [(copy.case, f"the copied file {copy.file}") for copy in experiment.copies]
    for figure in experiment.figures:
        if isinstance(figure, CurvesSpec):
            referred += [(case, f"the figure {figure.file}") for row in figure.rows for case in row]
        elif isinstance(figure, BarsSpec):
            referred += [(case, f"the figure {figure.file}") for case in figure.cases]
        elif isinstance(figure, FrontierSpec):
            referred += [(case, f"the figure {figure.file}") for points in figure.families.values() for case in points]
    referred += [(case, "quick") for case in (experiment.quick.only if experiment.quick else ())]
    for case, where in referred:
        if case not in names:
            raise UserError(
                f"{experiment.path}: {where} names the case {case!r}: there are {', '.join(dict.fromkeys(names))}."
            )


def _check_comparison(table: TableSpec, compare: CompareSpec, where: str) -> None:
    if table.rows != "means":
        raise UserError(f"{where} has rows {table.rows!r} and 'compare', which is of means alone: move it there.")
    if compare.metric not in MEASURES:
        raise UserError(f"{where} compares {compare.metric!r}: it must be one of {', '.join(MEASURES)}.")


def first_existing(choices: tuple[str, ...], project: Path) -> str | None:
    """The first of some texts that exists: a file, or a word (``builtin``, ``self``); None of no choices.

    Files come as full paths, without resolving links, so that they are the same from each folder.
    """
    full = ""
    for choice in choices:
        if "/" not in choice and "." not in choice:
            return choice
        full = os.path.normpath(project / choice)
        if Path(full).exists():
            return full
    return full or None
