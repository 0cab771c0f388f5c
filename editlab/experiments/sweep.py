"""``editlab sweep``: runs what an experiment lacks, and writes its tables and figures.

A finished run is not repeated, a stopped one is resumed from its last batch, and a failed one is tried again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from editlab.errors import EditLabError, UserError
from editlab.experiments import drawing, writing
from editlab.experiments.archive import archive
from editlab.experiments.estimate import report
from editlab.experiments.launch import LAUNCHERS, LOG
from editlab.experiments.plan import Options, Run, finished, planned, variables
from editlab.experiments.provenance import cores
from editlab.experiments.spec import Experiment

log = logging.getLogger(__name__)


def sweep(experiment: Experiment, options: Options) -> None:
    """Runs an experiment, or a part of it, and writes its tables and figures.

    Raises:
        UserError: for a case that does not exist, a fact file that does not exist, or a folder of runs with other
            settings.
        EditLabError: at the end, if runs have failed or were stopped.
    """
    runs, known = planned(experiment, options), finished(experiment, options)
    facts = variables(experiment, options)["facts"]
    if facts is not None and ("/" in facts or "." in facts) and not Path(experiment.project, facts).exists():
        raise UserError(f"There is no fact file {facts}: name one with --path, or give --path worldfacts.")
    if options.dry_run:
        log.info("%s", report(runs, options.workers, known))
        return
    if not options.no_run:
        execute(runs, options)
    done = [run for run in runs if run.summary is not None]
    results = writing.Results(experiment, options, done, finished(experiment, options))
    results.write()
    drawing.draw_all(experiment, options.out, results.all_runs)
    if options.archive:
        project, work = experiment.project.absolute(), options.work.absolute()
        places = {str(project): ".", str(project.parent): "..", str(work): "RUNS", str(Path.home()): "~"}
        packed = archive(runs, options.out / "logs" / experiment.name, places)
        log.info("logs/%s: settings, logs and outcomes of %d runs", experiment.name, len(packed))
    raise_if_failed(runs, options)


def execute(runs: Sequence[Run], options: Options) -> None:
    """Starts the runs that have no result.

    The first one of each seed is run before the others of that seed: what it computes and caches (values, second
    moments, scores of the unedited model) the others read.

    Raises:
        UserError: if a run was started with other settings, so that its result would not be that of this one.
    """
    other = next((run for run in runs if run.settings_differ), None)
    if other is not None:
        raise UserError(f"{other.folder} was started with other settings: give another --work, or remove that folder.")
    waiting = [run for run in runs if run.summary is None]
    cached = {run.seed for run in runs if run.summary is not None}
    first: Mapping[int, Run] = {run.seed: run for run in reversed(waiting) if run.seed not in cached}
    threads = max(1, cores() // options.workers)
    jobs = [run.job(threads) for run in waiting]
    run_of = dict(zip(jobs, waiting, strict=True))
    ahead = {run.seed: job for job, run in run_of.items() if first.get(run.seed) == run}
    after = {job: ahead[run.seed] for job, run in run_of.items() if ahead.get(run.seed, job) != job}
    with tqdm(total=len(jobs), desc="Runs", unit="run") as bar:
        for job, code in LAUNCHERS[options.launcher](jobs, options.workers, after):
            bar.update()
            if code:
                run = run_of[job]
                bar.write(f"{run.case.name}, seed {run.seed}, ended with exit code {code}: see {job.folder / LOG}")


def raise_if_failed(runs: Sequence[Run], options: Options) -> None:
    """Ends in an error if runs that were asked for have failed, or were stopped.

    Raises:
        EditLabError: naming them.
    """
    states = {"failed": "failed"} if options.no_run else {"failed": "failed", "to run": "were stopped"}
    found = []
    for status, verb in states.items():
        names = [f"{run.case.name}, seed {run.seed}" for run in runs if run.status == status]
        if names:
            found.append(f"{len(names)} of {len(runs)} runs {verb} ({'; '.join(names)})")
    if found:
        raise EditLabError(
            f"{', and '.join(found)}: see {LOG} in their folders, and repeat the command to resume or retry them."
        )
