"""One run as one HTML page that is complete in itself: no network, no script, no other file."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from matplotlib.figure import Figure

from editlab.metrics.names import BEFORE
from editlab.runs.figures import Series, forgetting_figure, perplexity_of_curve
from editlab.runs.outcome_table import outcome_table, worst_first
from editlab.runs.summary import counted
from editlab.runs.tables import STYLE as TABLE_STYLE
from editlab.runs.tables import Table, metric_table

STYLE = (
    TABLE_STYLE
    + """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.sub { margin-top: 0; opacity: .75; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
figure svg { width: 100%; height: auto; display: block; }
figure.narrow { display: none; }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; }
@media (max-width: 40rem) {
  figure.wide { display: none; } figure.narrow { display: block; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""
)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>{style}</style></head>
<body>
{body}
</body>
</html>
"""


OUTCOMES = 200
"""Largest number of edits in the table of outcomes, so that the page of a long run opens quickly."""


@dataclass(frozen=True)
class Missed:
    """An edit that the weights should hold and do not: the argmax differs from its target at some token.

    Attributes:
        number: number of the edit, from 1.
        batch: number of its batch, from 1.
        prompt: the edit prompt.
        target: the new target.
        answer: the model's greedy continuation now.
        learnt: whether the edit was right just after its batch; then it was forgotten, otherwise never learnt.
    """

    number: int
    batch: int
    prompt: str
    target: str
    answer: str
    learnt: bool


@dataclass(frozen=True)
class Example:
    """One edit that the weights should hold, with the model's continuations before and after all edits.

    Attributes:
        number: number of the edit, from 1.
        prompt: the edit prompt.
        target: the new target.
        before: the unedited model's greedy continuation.
        after: the edited model's.
        probability: geometric mean of the probabilities of the target's tokens now.
        held: whether the argmax is right at every token of the target.
    """

    number: int
    prompt: str
    target: str
    before: str
    after: str
    probability: float
    held: bool


@dataclass
class Page:
    """The content of a page.

    Attributes:
        title: heading of the page.
        settings: the recipe as YAML; "" if the run has no config.yaml.
        summary: content of the run's ``summary.json``; None if the run has not finished.
        curve: the run's ``metrics.csv``.
        fates: what became of each edit, in words.
        examples: some edits with the model's answers before and after, the worst first.
        missed: edits that the model does not hold; None if the model was not evaluated.
        events: name of an event log -> its events.
        adapted: number of modules with a separate adapter, without which the model was evaluated.
        outcomes: the rows of the run's ``outcomes.csv`` (:mod:`editlab.runs.outcomes`); none of older runs.
    """

    title: str
    settings: str
    summary: Mapping[str, Any] | None = None
    curve: Series = field(default_factory=dict)
    fates: Sequence[str] = ()
    missed: Sequence[Missed] | None = None
    events: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    adapted: int = 0
    examples: Sequence[Example] = ()
    outcomes: Sequence[Mapping[str, Any]] = ()

    def to_html(self) -> str:
        """The page as HTML."""
        parts = [
            f"<h1><bdi>{escape(self.title)}</bdi></h1>",
            f'<p class="sub">{escape(self._subtitle())}</p>',
            *self._metrics(),
            *self._curves(),
            *self._examples(),
            *self._missed(),
            *self._outcomes(),
            *self._fates(),
            *(part for name, events in self.events.items() for part in _events(name, events)),
            "<h2>Recipe</h2>",
            f"<details><summary>All settings of the model, the data and the callbacks</summary>"
            f"<pre>{escape(self.settings)}</pre></details>" if self.settings else "<p>The run has no config.yaml.</p>",
        ]  # fmt: skip
        return PAGE.format(title=escape(self.title), style=STYLE, body="\n".join(parts))

    def _subtitle(self) -> str:
        if self.summary is None:
            return "This run has not finished; --ckpt_path last resumes it after its last saved batch."
        s = self.summary
        undone = "".join(f", {s[k]} {k.replace('_', ' ')}" for k in ("rolled_back", "superseded") if s.get(k))
        parts = [f"{s['edits']} facts edited{undone}"]
        parts[0] += f" in {counted(s['batches'], 'batch', 'batches')}" if "batches" in s else ""
        parts += [f"{s['seconds']:.0f} s"] if "seconds" in s else []
        parts += [f"seed {s['seed']}"] if "seed" in s else []
        versions = ", ".join(f"{name} {version}" for name, version in s.get("versions", {}).items())
        return f"{'; '.join(parts)}. {versions}."

    def _metrics(self) -> Iterable[str]:
        if self.summary is None:
            return
        yield "<h2>Metrics before, right after, and at the end</h2>"
        yield (
            '<p>Values <span class="better">better \u2713</span> or <span class="worse">'
            "worse \u2717</span> than before.</p>"
        )
        yield metric_table(self.summary.get("metrics", {}), full=True).to_html()

    def _curves(self) -> Iterable[str]:
        if not self.curve:
            return
        before = perplexity_of_curve((self.summary or {}).get("metrics", {}), BEFORE)
        yield "<h2>Metrics over the number of edits</h2>"
        for kind, columns in (("wide", 3), ("narrow", 1)):
            svg = _svg(forgetting_figure(self.curve, before, columns), kind)
            yield f'<figure class="{kind}" aria-label="forgetting curves">{svg}</figure>'

    def _examples(self) -> Iterable[str]:
        if not self.examples:
            return
        number = "One edit" if len(self.examples) == 1 else f"{len(self.examples)} edits"
        yield f"<h2>{number} before and after, the worst first</h2>"
        yield "<p>P is the mean probability of a token of the target, after all edits.</p>"
        rows = [[str(e.number), e.prompt, e.target, e.before, e.after, f"{e.probability:.3f}"] for e in self.examples]
        colors = {(row, 4): "better" if one.held else "worse" for row, one in enumerate(self.examples)}
        yield Table(["edit", "prompt", "target", "before", "after", "P"], rows, (0, 5), colors).to_html()

    def _missed(self) -> Iterable[str]:
        yield "<h2>Edits that the model does not hold</h2>"
        if self.missed is None:
            yield "<p>The model was not evaluated (--no_answers).</p>"
            return
        forgotten = sum(one.learnt for one in self.missed)
        yield (
            f"<p>{forgotten} forgotten, {len(self.missed) - forgotten} never learnt. An edit is held if the argmax "
            "is right at every token of its target.</p>"
        )
        if self.adapted:
            yield (
                f"<p>The model was evaluated without the separate adapter that the run keeps for {self.adapted} "
                "modules; the metrics were measured with it.</p>"
            )
        if self.missed:
            rows = [
                [str(m.number), str(m.batch), m.prompt, m.target, m.answer, "forgotten" if m.learnt else "never learnt"]
                for m in self.missed
            ]
            header = ["edit", "batch", "prompt", "target", "the model's answer", ""]
            yield Table(header, rows, numbers=(0, 1)).to_html()

    def _outcomes(self) -> Iterable[str]:
        if not self.outcomes:
            return
        shown = worst_first(self.outcomes)[:OUTCOMES]
        yield f"<h2>{'Every edit' if len(shown) == len(self.outcomes) else f'{len(shown)} edits'}, the worst first</h2>"
        yield (
            "<p>P is the mean probability of a token of the target: on the unedited model, right after the edit's own "
            "step, and at the end. Paraphrases and neighbors are those whose answer is right at every token. Edits "
            "that are not in the weights come last.</p>"
        )
        yield f"<details><summary>Table of edits</summary>{outcome_table(shown).to_html()}</details>"

    def _fates(self) -> Iterable[str]:
        counts = Counter(" ".join(fate.split()[:2]) if fate != "kept" else fate for fate in self.fates)
        if set(counts) - {"kept"}:
            yield "<h2>What became of the edits</h2>"
            rows = [[fate.removesuffix(" by").removesuffix(" to"), str(count)] for fate, count in counts.most_common()]
            yield Table(["", "edits"], rows, numbers=(1,)).to_html()


def _svg(figure: Figure, kind: str) -> str:
    """A figure as an SVG element, whose ids differ from those of other kinds on the same page."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    return svg.replace(' id="', f' id="{kind}-').replace('href="#', f'href="#{kind}-').replace("url(#", f"url(#{kind}-")


def _events(name: str, events: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """The number of decisions of each kind in an event log, and a table of those other than ``keep``."""
    events = [event for event in events if "decision" in event]  # another program may write a log of that name
    counts = Counter(str(event["decision"]) for event in events)
    if not counts:
        return
    yield f"<h2>{escape(name.removesuffix('_events').replace('_', ' ').capitalize())}</h2>"
    yield "<p>" + escape(", ".join(f"{count} {decision}" for decision, count in counts.most_common())) + "</p>"
    shown = [event for event in events if event["decision"] != "keep"]
    if shown:
        rows = [
            [str(event["step"] + 1), str(event["decision"]), _number(event.get("score")), _reason(event)]
            for event in shown
        ]
        yield Table(["batch", "decision", "score", "reason"], rows, numbers=(0, 2)).to_html()


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, (int, float)) else ""


def _reason(event: Mapping[str, Any]) -> str:
    fact = event.get("fact")
    edit = f"{fact.get('subject')}: {fact.get('target_new')}" if isinstance(fact, Mapping) else ""
    return str(event.get("reason") or edit)
