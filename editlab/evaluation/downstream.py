"""Downstream tasks: EleutherAI's lm-evaluation-harness on a model in memory.

The harness is an extra, ``pip install 'editlab[lm-eval]'``, and is imported when it is first used. A task is one of its
names, such as ``mmlu``, or a YAML file of a task, with its data in a file next to it.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from editlab.distributed import ranks
from editlab.errors import EditLabError, UserError
from editlab.lm.language_model import LanguageModel
from editlab.utils.rng import restored_draws

SEED = 1234
"""Seed of the examples of few-shot prompts, the harness's own default."""

BOOTSTRAPS = 1000
"""Resamples for the standard errors of metrics that have no formula for it."""

ENDINGS = (".yaml", ".yml")


def require_harness() -> Any:
    """Import the package ``lm_eval`` and return it.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise UserError("Downstream tasks need lm-evaluation-harness: pip install 'editlab[lm-eval]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model in memory, which is what is wanted
    return lm_eval


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    value: float
    stderr: float | None = None
    """standard error over the task's documents, if it was computed"""


class Downstream:
    """Some downstream tasks, to be run on a model as often as wanted.

    Args:
        tasks: names of tasks or of groups of tasks, and paths of YAML files.
        limit: number of documents of each task, the first ones; default: all.
        batch_size: number of prompts that are run together.

    Raises:
        UserError: if the harness is not installed, or there is no such task or file.
    """

    def __init__(self, tasks: Sequence[str], limit: int | None = None, batch_size: int = 8) -> None:
        self.harness = require_harness()
        self.limit = limit
        self.batch_size = batch_size
        self.specs = [_spec(task) for task in tasks]
        named = [spec for spec in self.specs if isinstance(spec, str) and not _is_file(spec)]
        # Reading the harness's thousands of own tasks takes seconds.
        with restored_draws():
            self.manager = self.harness.tasks.TaskManager(include_defaults=bool(named))
        known = set(self.manager.all_tasks)
        for name in named:
            if name not in known:
                raise UserError(
                    f"There is no task {name!r}: give a name that 'lm-eval ls tasks' lists, or the path of a task's "
                    "YAML file."
                )

    def load(self) -> Any:
        """The tasks with their data.

        Raises:
            UserError: if a file is no task, or data cannot be read or fetched.
        """
        try:
            with restored_draws():
                loaded = self.manager.load(self.specs)
        except Exception as error:  # data sets raise errors of many kinds
            shown = " ".join(str(error).split()) or type(error).__name__
            names = ", ".join(spec if isinstance(spec, str) else str(spec["task"]) for spec in self.specs)
            raise UserError(
                f"A task of {names} cannot be loaded ({shown[:300]}): check its file, and fetch its data while online."
            ) from error
        for task in loaded["tasks"].values():  # as the harness's command does
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        return loaded

    def scores(self, lm: LanguageModel, stderr: bool = False) -> dict[str, dict[str, Score]]:
        """The metrics of all tasks on the weights as they are; rank 0 measures for all.

        Neither the model nor the tokenizer nor any random generator is changed.

        Args:
            lm: the model.
            stderr: whether to compute standard errors.

        Returns:
            Task -> metric -> score. The metrics of a group of tasks are under the group's name.

        Raises:
            EditLabError: if the harness fails.
        """
        return ranks.on_first(lambda: self._scores(lm, stderr))

    def _scores(self, lm: LanguageModel, stderr: bool) -> dict[str, dict[str, Score]]:
        loaded = self.load()
        with restored_draws():
            results = self._evaluated(lm, loaded, stderr)
        return found_in(results["results"], results.get("groups") or {})

    def _evaluated(self, lm: LanguageModel, loaded: Any, stderr: bool) -> Any:
        try:
            wrapped = self.harness.models.huggingface.HFLM(
                pretrained=lm.model,
                tokenizer=copy.deepcopy(lm.tokenizer),  # it gets a padding token
                batch_size=self.batch_size,
            )
            return self.harness.evaluate(
                lm=wrapped,
                task_dict=loaded,
                limit=self.limit,
                bootstrap_iters=BOOTSTRAPS if stderr else 0,
                log_samples=False,
            )
        except EditLabError:
            raise
        except Exception as error:  # errors of tasks' own code are of any kind
            shown = " ".join(str(error).split()) or type(error).__name__
            raise EditLabError(f"lm-evaluation-harness failed ({type(error).__name__}: {shown[:300]}).") from error


def found_in(*tables: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Score]]:
    """Task -> metric -> score of the harness's tables of results.

    The harness names a metric with the filter of the answers, ``acc,none`` or ``exact_match,strict-match``; the filter
    ``none`` is left out here.

    >>> found_in({"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": "N/A", "f1,strict": 1}})
    {'t': {'acc': Score(value=0.5, stderr=None), 'f1_strict': Score(value=1.0, stderr=None)}}
    """
    found: dict[str, dict[str, Score]] = {}
    for table in tables:
        for task, row in table.items():
            for name, value in row.items():
                metric, comma, kind = name.partition(",")
                if comma and not metric.endswith("_stderr") and _is_number(value):
                    error: Any = row.get(f"{metric}_stderr,{kind}")
                    shown = metric if kind == "none" else f"{metric}_{kind}"
                    score = Score(float(value), float(error) if _is_number(error) else None)
                    found.setdefault(task, {})[shown] = score
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_file(task: str) -> bool:
    return task.endswith(ENDINGS)


def _spec(task: str) -> str | dict[str, Any]:
    """A task as the harness loads it: its name, its file, or its file's content with the paths of its data completed.

    In the harness, relative paths of data (``dataset_kwargs: {data_files: ...}``) count from the working directory;
    here they count from the task's file. A file with an ``include`` or with functions is left to the harness.

    Raises:
        UserError: if there is no such file, or it is not a task.
    """
    if not _is_file(task):
        return task
    path = Path(task).expanduser()
    if not path.is_file():
        raise UserError(f"There is no task file {task!r}: correct its path.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError:  # !function
        return str(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"The task file {task} is not valid YAML: correct it.") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("task"), str):
        raise UserError(f"{task} is not a task of lm-evaluation-harness, as it has no name under 'task': add one.")
    data = (content.get("dataset_kwargs") or {}).get("data_files")
    if data is None or "include" in content:
        return str(path)
    completed = {**content["dataset_kwargs"], "data_files": _completed(data, path.parent)}
    return {**content, "dataset_kwargs": completed}


def _completed(data: Any, folder: Path) -> Any:
    """Paths of data with those that exist in a folder completed, in a list or mapping too."""
    if isinstance(data, Mapping):
        return {name: _completed(one, folder) for name, one in data.items()}
    if isinstance(data, list):
        return [_completed(one, folder) for one in data]
    if isinstance(data, str) and (folder / data).is_file():
        return os.path.abspath(folder / data)
    return data
