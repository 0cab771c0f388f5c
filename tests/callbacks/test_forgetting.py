"""Forgetting curves: when points are measured, on which edits, and the charts of TensorBoard."""

import re
from dataclasses import replace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from callbacks import ForgettingCurve, LoRAAdjust
from editlab.errors import UserError
from editlab.evaluation.settings import EvaluationSettings
from tests.facts import FACTS, write_counterfact
from tests.test_editor import editor, fit


@pytest.mark.draws
def test_points_and_what_they_measure(tiny_folder, tmp_path):
    curve = ForgettingCurve(every_n_edits=4, sample=3)
    module = editor(tiny_folder)
    fit(tmp_path, module, callbacks=[curve], limit=10, batch_size=2)
    assert sorted(curve.curve) == [4, 8, 10]
    # The last point is of all edits, measured anew here.
    expected = module.evaluation.measure(module.lm, module.edited_facts)
    assert curve.curve[10]["retained/ES"] == expected["ES"]
    assert set(curve.curve[4]) == {f"retained/{name}" for name in (*expected, "perplexity", "generation_entropy")}
    run = tmp_path / "logs" / "run" / "version_0"
    steps = {
        group: [e.step for e in EventAccumulator(str(run / group)).Reload().Scalars("scores/ES")]
        for group in ("before", "immediate", "retained")
    }
    every = [2, 4, 6, 8, 10]
    assert steps == {"before": every, "immediate": every, "retained": [4, 8, 10]}
    events = EventAccumulator(str(run)).Reload()
    assert "forgetting" in events.Tags()["images"]
    (pattern,) = layout(events)["ES"]
    found = [name for name in ("scores/ES", "retained/ES", "scores/ES_magnitude", "x/ES") if re.match(pattern, name)]
    assert found == ["scores/ES", "retained/ES"]


def test_the_first_edits_are_measured_again_at_each_point_once_all_are_made(tiny_folder, tmp_path):
    curve = ForgettingCurve(every_n_edits=2, sample=1, cohort=4)
    module = editor(tiny_folder)
    fit(tmp_path, module, callbacks=[curve], limit=8, batch_size=2)
    assert [edits for edits, point in sorted(curve.curve.items()) if "cohort/accuracy" in point] == [4, 6, 8]
    first = module.trainer.datamodule.facts[:4]
    assert module.edited_facts[:4] == first
    expected = {f"cohort/{name}": value for name, value in module.evaluation.measure(module.lm, first).items()}
    assert {name: value for name, value in curve.curve[8].items() if name.startswith("cohort/")} == expected
    events = EventAccumulator(str(tmp_path / "logs" / "run" / "version_0")).Reload()
    assert [event.step for event in events.Scalars("cohort/accuracy")] == [4, 6, 8]
    assert layout(events)["accuracy of the first 4 edits"] == ["^cohort/accuracy$"]


def test_the_last_point_of_the_first_edits_is_measured_while_the_model_is_on_its_device(tiny_folder, tmp_path):
    late = []

    class Spied(ForgettingCurve):
        ended = False

        def on_fit_end(self, trainer, pl_module):
            self.ended = True  # Lightning has moved the model to the CPU, and ended its precision
            super().on_fit_end(trainer, pl_module)

        def _of_cohort(self, trainer, editor):
            late.append(self.ended)
            return super()._of_cohort(trainer, editor)

    curve = Spied(every_n_edits=4, cohort=2)
    fit(tmp_path, editor(tiny_folder), callbacks=[curve], limit=6, batch_size=2)
    assert late == [False, False]
    assert [edits for edits, point in sorted(curve.curve.items()) if "cohort/ES" in point] == [4, 6]


def test_a_fact_that_is_edited_again_leaves_the_cohort(tiny_folder, tmp_path):
    again = replace(FACTS[0], target_new="elsewhere")
    path = write_counterfact(tmp_path / "again.json", [*FACTS[:3], again])
    curve = ForgettingCurve(every_n_edits=2, cohort=4)
    module = editor(tiny_folder)
    fit(tmp_path, module, callbacks=[curve], limit=4, batch_size=1, path=path, keep_repeats=True)
    assert len(module.edited_facts) == 3
    standing = module.evaluation.measure(module.lm, module.edited_facts)
    assert curve.curve[4]["cohort/ES_magnitude"] == pytest.approx(standing["ES_magnitude"], rel=1e-6)


def layout(events):
    """The custom scalars' charts: title -> patterns."""
    (event,) = events.Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {chart.title: list(chart.multiline.tag) for category in parsed.category for chart in category.chart}


@pytest.mark.parametrize("lora", [False, True])
def test_no_chart_is_empty(tiny_folder, tmp_path, lora):
    """A chart is there if and only if the run logs one of its names."""
    bare = [replace(fact, paraphrases=(), neighbors=()) for fact in FACTS]
    path = write_counterfact(tmp_path / "bare.json", bare)
    callbacks = [ForgettingCurve(every_n_edits=2)]
    callbacks += [LoRAAdjust(rank=2, steps=1, every_n_batches=1, text_tokens=64)] if lora else []
    evaluation = EvaluationSettings(heldout_tokens=64, generation=0, bystanders=0, generated_texts=0)
    fit(tmp_path, editor(tiny_folder, evaluation=evaluation), callbacks=callbacks, limit=4, path=path)
    run = tmp_path / "logs" / "run" / "version_0"
    events = EventAccumulator(str(run)).Reload()
    charts, logged = layout(events), list(events.Tags()["scalars"])
    for group in ("before", "immediate", "retained"):
        logged += EventAccumulator(str(run / group)).Reload().Tags()["scalars"]
    for title, patterns in charts.items():
        assert any(re.match(pattern, name) for pattern in patterns for name in logged), title
    expected = {"ES", "accuracy", "held-out perplexity", "norm of the update"}
    assert set(charts) == expected | ({"edits around an adjustment"} if lora else set())


def test_the_sample_is_fixed_by_fact_and_seed():
    curve = ForgettingCurve(sample=4)
    small, large = curve._sampled(FACTS[:8]), curve._sampled(FACTS)
    assert len(small) == len(large) == 4
    # A member leaves only when a new fact of lower rank comes in: who is in both lists' range stays.
    assert [f for f in large if f in FACTS[:8]] == [f for f in small if f in large]
    assert curve._sampled(FACTS) == large
    assert ForgettingCurve(sample=4, seed=1)._sampled(FACTS) != large
    assert curve._sampled(FACTS[:2]) == FACTS[:2]


def test_state_goes_round():
    curve = ForgettingCurve()
    curve.curve, curve._last = {4: {"retained/ES": 1.0}}, 4
    other = ForgettingCurve()
    other.load_state_dict(curve.state_dict())
    assert (other.curve, other._last) == (curve.curve, 4)


@pytest.mark.parametrize("arguments", [{"every_n_edits": 0}, {"sample": 0}, {"cohort": -1}])
def test_out_of_range(arguments):
    with pytest.raises(UserError, match=r"at least 1|negative"):
        ForgettingCurve(**arguments)
