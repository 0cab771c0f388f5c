"""Names of metrics: those that a run logs are those that the module lists."""

from editlab.metrics import EditMetrics, names
from tests.metrics.tester import FIRST, scores


def test_every_metric_of_facts_is_listed():
    metrics, some = EditMetrics(), scores(FIRST)
    metrics.update(edit=some, paraphrases=some, neighbors=some)
    assert set(metrics.measured()) == set(names.SCORED)
    assert {metric.name for metric in names.METRICS} - set(names.LANGUAGE) - set(names.SCORED) == {
        *(names.generation_name(prompts) for prompts in names.PROMPTS), names.BYSTANDER_ACCURACY,
    }  # fmt: skip
    assert set(names.TABLE_GROUPS) < set(names.GROUPS)


def test_the_best_value_depends_on_the_metric():
    best = {metric.name: metric.best([1.0, 2.0]) for metric in names.METRICS}
    assert (best["ES"], best["perplexity"]) == (2.0, 1.0)


def test_groups_go_round():
    values = {"ES": 0.5, "perplexity": 20.0}
    assert names.of_group(names.add_group("before", values) | {"retained/ES": 1.0}, "before") == values
