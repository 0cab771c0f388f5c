"""Free answers: which prompts are asked, how answers are scored, and what becomes of them in a run."""

from dataclasses import replace

import pytest

from editlab.data.fact import Fact, Neighbor, Question
from editlab.errors import UserError
from editlab.evaluation import generation
from editlab.evaluation.bystanders import bystander_accuracy, prompts_of_bystanders
from editlab.evaluation.evaluator import Evaluation
from editlab.evaluation.generation import Asked, fixed_sample, generate_answers, generation_metrics, prompts_of_edits
from editlab.evaluation.judge import JudgeSettings
from editlab.evaluation.portability import portability_accuracy, questions
from editlab.evaluation.scoring import score_pairs
from editlab.evaluation.settings import EvaluationSettings
from editlab.lm.generate import greedy_continuations
from editlab.lm.language_model import LanguageModel
from editlab.runs.outcomes import answers_of
from tests.facts import FACTS
from tests.tiny import tiny_model, tiny_tokenizer

FRANCE = Fact(
    "France", "The capital of {} is", "Rome", "Paris", ("Paraphrase one", "Paraphrase two"),
    (Neighbor("The capital of Norway is", "Oslo"), Neighbor("The capital of Peru is", "Lima")), aliases=("Roma",),
    truth_aliases=("City of Light",),
    portability=(
        Question("multi-hop", "The Eiffel Tower stands in", ("Rome", "Roma")),
        Question("multi-hop", "The seat of France's government is", ("Rome", "Roma")),
        Question("reversed", "Rome is the capital of", ("France",)),
    ),
)  # fmt: skip
SPAIN = replace(FRANCE, subject="Spain", paraphrases=(), neighbors=(), aliases=(), portability=())


@pytest.fixture
def lm():
    return LanguageModel(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer())


@pytest.fixture
def said(monkeypatch):
    """What the model says after each prompt; nothing after others."""
    answers = {}
    monkeypatch.setattr(
        generation, "greedy_continuations", lambda lm, prompts, n: [answers.get(p, "") for p in prompts]
    )
    return answers


def test_the_edit_prompt_one_paraphrase_and_one_neighbor_are_asked():
    asked = prompts_of_edits([SPAIN, FRANCE], [0, 1])
    assert asked == [
        Asked(0, "edit", "The capital of Spain is", ("Rome",)),
        Asked(1, "edit", "The capital of France is", ("Rome", "Roma")),
        Asked(1, "paraphrase", "Paraphrase one", ("Rome", "Roma")),
        Asked(1, "neighbor", "The capital of Norway is", ("Oslo",)),
    ]
    assert [one.kind for one in prompts_of_edits([FRANCE], [0], neighbors=0)] == ["edit", "paraphrase"]
    bare = replace(FRANCE, target_true=None)
    assert prompts_of_bystanders([bare, FRANCE]) == [
        Asked(1, "bystander", "The capital of France is", ("Paris", "City of Light"))
    ]


def test_answers_are_scored_by_kind(said):
    """By hand: of two edit prompts one contains its alias and has two words; the neighbor's answer is exact."""
    said |= {"The capital of France is": "Roma, Italy.", "The capital of Norway is": "Oslo"}
    answers = generate_answers(None, [*prompts_of_edits([FRANCE, SPAIN], [0, 1]), Asked(1, "edit", " ", ("x",))])
    assert [(one.index, one.kind, one.text) for one in answers] == [
        (0, "edit", "Roma, Italy."), (0, "paraphrase", ""), (0, "neighbor", "Oslo"), (1, "edit", ""),
    ]  # fmt: skip
    assert generation_metrics(answers) == pytest.approx({
        "generation": 0.5, "generation_exact": 0.0, "generation_f1": (2 / 3) / 2,
        "paraphrase_generation": 0.0, "paraphrase_generation_exact": 0.0, "paraphrase_generation_f1": 0.0,
        "neighbor_generation": 1.0, "neighbor_generation_exact": 1.0, "neighbor_generation_f1": 1.0,
    })  # fmt: skip
    assert generation_metrics([]) == {}


def test_a_fact_is_answered_where_any_of_its_multi_hop_questions_is(said):
    said |= {"The seat of France's government is": "the city of Rome."}
    found = generation_metrics(generate_answers(None, questions([SPAIN, FRANCE], [0, 1])))
    assert {name: value for name, value in found.items() if name.endswith("generation")} == {
        "portability/multi-hop/generation": 1.0, "portability/reversed/generation": 0.0,
    }  # fmt: skip


def test_questions_of_two_cases_of_a_fact_count_apart(said):
    # The first case is answered in its second wording, the other one in none: one of two.
    other = (
        Question("multi-hop", "Spoken there is", ("Latin",)),
        Question("multi-hop", "People there speak", ("Latin",)),
    )
    said |= {"The seat of France's government is": "the city of Rome."}
    fact = replace(FRANCE, portability=(*FRANCE.portability, *other))
    found = generation_metrics(generate_answers(None, questions([SPAIN, fact, FRANCE], [0, 1, 2])))
    assert found["portability/multi-hop/generation"] == pytest.approx(2 / 3)  # FRANCE has the first case again


def test_portability_accuracy_is_that_of_the_first_answer(lm):
    asked = [(q.prompt, q.answers[0]) for q in FRANCE.portability]
    _, hits = score_pairs(lm, asked)
    assert portability_accuracy(lm, [FRANCE, SPAIN]) == {
        "portability/multi-hop/accuracy": float(hits[0] or hits[1]), "portability/reversed/accuracy": float(hits[2]),
    }  # fmt: skip
    assert portability_accuracy(lm, [SPAIN]) == {}


def test_bystander_accuracy(lm):
    _, hits = score_pairs(lm, [(fact.question, fact.target_true) for fact in FACTS])
    assert bystander_accuracy(lm, [*FACTS, replace(FRANCE, target_true=None)]) == {
        "bystander_accuracy": float(hits.double().mean())
    }
    assert bystander_accuracy(lm, []) == {}


def test_the_sample_is_fixed():
    assert fixed_sample(FACTS, None) == fixed_sample(FACTS, 99) == list(range(len(FACTS)))
    assert fixed_sample(FACTS, 0) == []
    small, large = fixed_sample(FACTS[:8], 4), fixed_sample(FACTS, 4)
    assert len(small) == 4
    assert [i for i in large if i < 8] == [i for i in small if i in large]
    assert fixed_sample(FACTS, 4, seed=1) != large


# ---- in a run ---------------------------------------------------------------------------------------------------


SETTINGS = {"heldout_tokens": 0, "generation": 3, "snapshot_generation": 2, "bystanders": 2}


def test_a_run_asks_before_and_at_the_end_and_keeps_the_answers(lm):
    evaluation = Evaluation(EvaluationSettings(**SETTINGS))
    facts = [*FACTS[:4], FRANCE]
    evaluation.measure_unedited(lm, facts, FACTS[6:8])
    before = evaluation.generated["before"]
    chosen = fixed_sample(facts, 3)
    assert sorted({one.index for one in before if one.kind == "edit"}) == chosen
    assert [one.index for one in before if one.kind == "bystander"] == [0, 1]
    assert [one.text for one in before] == greedy_continuations(lm, [one.prompt for one in before])
    found = evaluation.results()
    assert {"before/generation", "before/neighbor_generation_f1", "before/bystander_accuracy",
            "before/bystander_generation", "before/portability/multi-hop/accuracy"} <= set(found)  # fmt: skip
    evaluation.measure_unedited(lm, facts, FACTS[6:8])
    assert evaluation.generated["before"] is before  # once
    retained = evaluation.measure_retained(lm, facts, 5, [])
    # The weights are the same, and so is all that was asked.
    asked = {n.removeprefix("before/"): v for n, v in evaluation.asked_before.items()}
    assert {n: retained[f"retained/{n}"] for n in asked} == asked
    assert evaluation.generated["retained"] == before
    assert {"generation", "bystanders", "portability", "language"} == set(evaluation.costs)
    point = evaluation.snapshot(lm, FACTS[:5])
    assert {"ES", "generation", "paraphrase_generation"} <= set(point)
    assert not [name for name in point if "bystander" in name or "portability" in name or "perplexity" in name]


def test_another_run_reads_what_the_unedited_model_said(lm, monkeypatch):
    facts, one, other = (
        FACTS[:4],
        Evaluation(EvaluationSettings(**SETTINGS)),
        Evaluation(EvaluationSettings(**SETTINGS)),
    )
    one.measure_unedited(lm, facts, FACTS[6:8], one.cache(lm, "said before"))
    monkeypatch.setattr("editlab.evaluation.generation.greedy_continuations", None)  # would fail if it were asked again
    other.measure_unedited(lm, facts, FACTS[6:8], other.cache(lm, "said before"))
    assert other.generated["before"] == one.generated["before"]
    with pytest.raises(TypeError):  # what the edited model says is not read
        other.measure_retained(lm, facts, 4, [])


def test_what_was_said_before_is_in_a_checkpoint(lm, monkeypatch):
    evaluation = Evaluation(EvaluationSettings(**SETTINGS))
    evaluation.measure_unedited(lm, FACTS[:2], FACTS[6:8])
    other = Evaluation(EvaluationSettings(**SETTINGS))
    other.load_state_dict(evaluation.state_dict())
    assert other.generated["before"] == evaluation.generated["before"]
    monkeypatch.setattr("editlab.evaluation.evaluator.generate_answers", None)  # would fail if they were asked again
    other.measure_unedited(lm, FACTS[:2], FACTS[6:8])
    assert other.asked_before == evaluation.asked_before
    assert other.bystanders == FACTS[6:8]
    older = {k: v for k, v in evaluation.state_dict().items() if k not in ("asked_before", "generated_before", "costs")}
    other.load_state_dict(older)
    assert other.asked_before == {}


def test_nothing_is_asked_where_it_is_turned_off(lm):
    evaluation = Evaluation(EvaluationSettings(heldout_tokens=0, generation=0, bystanders=0))
    evaluation.measure_unedited(lm, FACTS[:2])
    assert evaluation.results() == {}
    assert evaluation.generated == {"before": []}
    assert not [name for name in evaluation.snapshot(lm, FACTS[:2]) if "generation" in name]
    assert EvaluationSettings(generation="all").answered is None
    for bad in (-1, "some"):
        with pytest.raises(UserError, match=r"generation is .*: set a number of facts, 0 for none, or all"):
            EvaluationSettings(generation=bad)
    with pytest.raises(UserError, match="bystanders is -1"):
        EvaluationSettings(bystanders=-1)


def test_a_judge_is_asked_about_answers_to_edit_prompts(said, monkeypatch):
    said |= {"The capital of France is": "Roma, Italy.", "The capital of Spain is": "it."}
    judge, seen = JudgeSettings("http://localhost:1/v1", "stub"), []

    def judged(settings, items):
        assert settings is judge
        seen.extend(items)
        return [True, None]

    monkeypatch.setattr(generation, "judged", judged)
    answers = generate_answers(None, prompts_of_edits([FRANCE, SPAIN], [0, 1]), judge)
    assert [tuple(item) for item in seen] == [
        ("The capital of France is", "Roma, Italy.", "Rome", ("Roma",)), ("The capital of Spain is", "it.", "Rome", ()),
    ]  # fmt: skip
    assert [(one.kind, one.judged) for one in answers] == [
        ("edit", True), ("paraphrase", None), ("neighbor", None), ("edit", None),
    ]  # fmt: skip
    assert generation_metrics(answers)["generation_judged"] == 1.0  # of the one with a verdict
    assert answers_of({"retained": answers})["retained"] == {
        0: {"generated": "Roma, Italy.", "contains": True, "exact": False, "f1": pytest.approx(2 / 3), "judged": True},
        1: {"generated": "it.", "contains": False, "exact": False, "f1": 0.0},
    }
    monkeypatch.setattr(generation, "judged", lambda settings, items: None)  # it fails
    answers = generate_answers(None, prompts_of_edits([FRANCE], [0]), judge)
    assert "generation_judged" not in generation_metrics(answers)
