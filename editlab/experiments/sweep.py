"""Many ``editlab fit`` runs: each in a process of its own, skipped where its result is there, resumed where it stopped.

The experiments of this folder are lists of cases over this. A run's folder is ``WORK/CASE/version_SEED``; what it said,
also where it failed, is in its ``run.log`` (see ``launch.py``).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec

import dry_run
from launch import FAILED, JOINT, LAUNCHERS, LOG, ROOT, UNKNOWN, WHERE, Job, cores, read_provenance
from tqdm import tqdm

from editlab.errors import EditLabError
from editlab.runs.figures import Series
from editlab.runs.folders import RunFolder

TEXT = ROOT.parent / "shared" / "data" / "text"


@dataclass(frozen=True)
class Case:
    """One configuration: a name, recipes from ``configs/``, flags, and the callbacks."""

    name: str
    flags: Mapping[str, Any]
    callbacks: Sequence[Mapping[str, Any]] = ()
    labels: Mapping[str, Any] = field(default_factory=dict)
    """columns of the table that say what the case is"""

    def over(self, common: Mapping[str, Any]) -> Case:
        """The same case with flags that its experiment gives to all, below its own."""
        return replace(self, flags={**common, **self.flags})

    def given(self, settings: Iterable[tuple[str, str, Any]], flags: Iterable[tuple[str, str]] = ()) -> Case:
        """The same case with settings (class, name, value) of its callbacks, where it has such, and with flags."""
        own: dict[str, dict[str, Any]] = {}
        for owner, name, value in settings:
            own.setdefault(owner, {})[name] = value
        callbacks = [
            {**one, "init_args": {**one.get("init_args", {}), **own.get(one["class_path"].rpartition(".")[2], {})}}
            for one in self.callbacks
        ]
        return replace(self, callbacks=callbacks, flags={**self.flags, **dict(flags)})

    def arguments(self, recipe: str, seed: int, work: Path) -> list[str]:
        """What ``editlab`` is called with."""
        flags = {
            "data.seed": seed,
            "seed_everything": seed,
            "trainer.enable_progress_bar": False,
            **self.flags,
        }
        place = {"save_dir": str(work), "name": self.name, "version": f"version_{seed}"}
        # None first: jsonargparse would let what the recipe's callback of the same class is given stand.
        callbacks = ["--trainer.callbacks=null", f"--trainer.callbacks={json.dumps(list(self.callbacks))}"]
        settings = [*(f"--{name}={_plain(value)}" for name, value in flags.items()), *callbacks]
        return ["fit", "--config", recipe, *settings, *(f"{WHERE}{name}={value}" for name, value in place.items())]


@dataclass(frozen=True)
class Run:
    """One case with one seed, and where it lies."""

    case: Case
    seed: int
    folder: Path
    recipe: str = ""

    @property
    def status(self) -> str:
        """``done``, ``failed`` or ``to run``."""
        if self.summary is not None:
            return "done"
        return "failed" if (self.folder / FAILED).exists() else "to run"

    @property
    def summary(self) -> dict[str, Any] | None:
        """The run's ``summary.json``; None where it has not finished."""
        return RunFolder(self.folder).summary

    @property
    def other_settings(self) -> bool:
        """Whether it was begun with other settings than it would be now; of an older run that is not known."""
        noted = {*read_provenance(self.folder).get("settings", UNKNOWN).split(JOINT)} - {UNKNOWN}
        return self.begun and bool(noted) and noted != {self.job(1).settings}

    @property
    def begun(self) -> bool:
        """Whether it has finished, or would go on from a checkpoint."""
        return self.summary is not None or (self.folder / "checkpoints" / "last.ckpt").exists()

    def job(self, threads: int) -> Job:
        """What starts it, or lets it go on, on so many cores."""
        folder = self.folder.absolute()
        return Job(folder, tuple(self.case.arguments(self.recipe, self.seed, folder.parents[1])), threads)

    def curve(self) -> Series:
        """The run's ``metrics.csv``: number of edits -> name -> value."""
        return RunFolder(self.folder).curve


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is under 1")
    return number


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _place(text: str) -> str:
    """The full path of a file that is there, as runs have another working folder; other words as they are."""
    return str(Path(text).resolve()) if Path(text).is_file() else text


def _setting(text: str) -> tuple[str, str, Any]:
    """CLASS.NAME=VALUE, the value as JSON or else a word."""
    found = re.fullmatch(r"(\w+)\.(\w+)=(.*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no CLASS.NAME=VALUE")
    owner, name, value = found.groups()
    try:
        return owner, name, json.loads(value)
    except json.JSONDecodeError:
        return owner, name, value


def _flag(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, given, value = text.partition("=")
    if not (name and given):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE")
    return name, value


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The arguments that all experiments share."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--path", type=_place, default=str(ROOT.parent / "shared" / "data" / "counterfact.json"), help="fact file"
    )
    found.add_argument("--edits", type=_at_least_one, default=500)
    found.add_argument("--batch_size", type=_at_least_one, default=32)
    found.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    found.add_argument("--only", nargs="+", help="names of the cases to run; all where not given")
    found.add_argument("--work", type=Path, help="folder of the runs")
    found.add_argument("--out", type=Path, default=ROOT, help="folder whose results/ and figs/ are written to")
    found.add_argument(
        "--workers", type=_at_least_one, default=1, help="runs at a time; the cores are shared out among them"
    )
    found.add_argument(
        "--launcher", choices=list(LAUNCHERS), default="local", help="ray: over the machines of a cluster"
    )
    found.add_argument("--callback", type=_setting, nargs="+", default=[], metavar="CLASS.NAME=VALUE",
                       help="settings of callbacks in all cases that have them: LoRAAdjust.steps=4")  # fmt: skip
    found.add_argument("--set", type=_flag, nargs="+", default=[], metavar="NAME=VALUE",
                       help="settings of all cases, over their own: model.evaluation.neighbors=1")  # fmt: skip
    found.add_argument("--dry-run", action="store_true", help="say what would be run")
    found.add_argument("--no-run", action="store_true", help="only write tables and figures of the runs that are there")
    found.set_defaults(**defaults)
    return found


def add_texts(shared: argparse.ArgumentParser) -> None:
    """The arguments for texts: WikiText where it is at hand, else what comes with editlab."""
    texts = {"heldout": TEXT / "wikitext2_test.txt", "moments": TEXT / "wikitext2_valid.txt"}
    heldout, moments = (str(path) if path.exists() else None for path in texts.values())
    shared.add_argument("--heldout", type=_place, default=heldout or "builtin", help="text of the perplexity")
    shared.add_argument("--moments", type=_place, default=moments or "self", help="text of the second moments")
    shared.add_argument(
        "--tokens", type=int, help="of the second moments; 24576 of the model's own text, 160000 of others"
    )


def common_flags(options: argparse.Namespace) -> dict[str, Any]:
    """Flags of an experiment's runs: its facts and texts, and no more scoring than its table needs."""
    return {
        "data.path": options.path,
        "data.limit": options.edits,
        "data.batch_size": options.batch_size,
        "model.evaluation.immediate": "edits",
        "model.evaluation.neighbors": 3,
        "model.evaluation.heldout": options.heldout,
        "model.evaluation.generated_texts": 0,
        "model.moments.text": options.moments,
        "model.moments.tokens": options.tokens or (24576 if options.moments == "self" else 160000),
    }


def planned(cases: Iterable[Case], recipe: str, options: argparse.Namespace) -> list[Run]:
    """Every case that is asked for with every seed, whether it has a result or not.

    Exits with a sentence where there is no case of a name that is asked for.
    """
    cases = list(cases)
    unknown = set(options.only or ()) - {case.name for case in cases}
    if unknown:
        sys.exit(f"There is no case {', '.join(sorted(unknown))}: there are {', '.join(c.name for c in cases)}.")
    asked = [case for case in cases if not options.only or case.name in options.only]
    chosen = [case.given(options.callback, options.set) for case in asked]
    return [
        Run(case, seed, options.work / case.name / f"version_{seed}", recipe)
        for seed in dict.fromkeys(options.seeds)
        for case in chosen
    ]


def at_hand(cases: Iterable[Case], recipe: str, options: argparse.Namespace) -> list[Run]:
    """Every finished run of the cases in ``--work``, whichever were asked for."""
    folders = (re.fullmatch(r"version_(\d+)", path.name) for path in options.work.glob("*/version_*"))
    seeds = sorted({int(found[1]) for found in folders if found})
    every = argparse.Namespace(**{**vars(options), "only": None, "seeds": seeds})
    return [run for run in planned(cases, recipe, every) if run.summary is not None]


def run_all(runs: Sequence[Run], options: argparse.Namespace, known: Sequence[Run] = ()) -> list[Run]:
    """Runs what has no result yet.

    The first of each seed goes ahead of the others of that seed: what it finds and keeps in the cache (values, second
    moments, scores of the unedited model) they need not find again.

    Args:
        runs: of :func:`planned`, the ones that matter most first.
        options: of :func:`parser`.
        known: of :func:`at_hand`; a dry run's times are measured on them.

    Returns:
        Those that have a result. Exits with a sentence where the fact file is absent, or a run was begun with other
        settings, for which it would be taken.
    """
    if options.path != "worldfacts" and not Path(options.path).exists():
        sys.exit(f"{options.path} is not there: give a file of facts with --path, or --path worldfacts.")
    waiting = [run for run in runs if run.summary is None]
    if options.dry_run:
        dry_run.show(runs, options.workers, known)
        return []
    if not options.no_run:
        other = next((run for run in runs if run.other_settings), None)
        if other is not None:
            sys.exit(f"{other.folder} was begun with other settings: give another --work, or remove that folder.")
        paid = {run.seed for run in runs if run.summary is not None}
        _carry_out(waiting, {run.seed: run for run in reversed(waiting) if run.seed not in paid}, options)
    return [run for run in runs if run.summary is not None]


def _carry_out(runs: Sequence[Run], first: Mapping[int, Run], options: argparse.Namespace) -> None:
    """Runs what is missing; ``first`` is the run of a seed that the others of it wait for."""
    threads = max(1, cores() // options.workers)
    jobs = [run.job(threads) for run in runs]
    of = dict(zip(jobs, runs, strict=True))
    ahead = {run.seed: job for job, run in of.items() if first.get(run.seed) == run}
    after = {job: ahead[run.seed] for job, run in of.items() if ahead.get(run.seed, job) != job}
    with tqdm(total=len(runs), desc="Runs", unit="run") as bar:
        for job, code in LAUNCHERS[options.launcher](jobs, options.workers, after):
            bar.update()
            if code:
                bar.write(f"{of[job].case.name}, seed {of[job].seed}, ended with {code}: see {job.folder / LOG}")


def exit_where_failed(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Ends the program with exit code 1 and a sentence where runs that were asked for have failed, or were stopped."""
    if options.dry_run:
        return
    ends = {"failed": "failed"} if options.no_run else {"failed": "failed", "to run": "did not come to their end"}
    told = []
    for status, what in ends.items():
        found = [f"{run.case.name}, seed {run.seed}" for run in runs if run.status == status]
        if found:
            told.append(f"{len(found)} of {len(runs)} runs {what} ({'; '.join(found)})")
    if told:
        sys.exit(f"{', and '.join(told)}: see {LOG} in their folders.")


P = ParamSpec("P")


def in_a_sentence(main: Callable[P, None]) -> Callable[P, None]:
    """A script's ``main`` whose errors of editlab's own end it with their sentence, and no traceback."""

    @wraps(main)
    def told(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            main(*args, **kwargs)
        except EditLabError as error:
            sys.exit(str(error))

    return told
