"""One run as one HTML page that needs nothing else: no network, no script, no file beside it."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from editlab.runs.figures import Series, forgetting_figure
from editlab.runs.summary import GROUPS, NAMES, counted

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.sub { margin-top: 0; opacity: .75; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; }
figure svg { width: 100%; height: auto; display: block; }
pre { background: var(--soft); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
summary { cursor: pointer; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""


PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{style}</style></head>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Missed:
    """An edit that the weights should hold and do not: the model's likeliest tokens are not its target."""

    number: int
    """of the edit, from 1"""
    batch: int
    """from 1"""
    prompt: str
    target: str
    answer: str
    """what the model says now"""
    learnt: bool
    """whether it was right just after its batch: then it is forgotten, else it was never learnt"""


@dataclass
class Page:
    """What is shown."""

    title: str
    settings: str
    """the recipe as YAML"""
    summary: Mapping[str, Any] | None = None
    """None where the run has not finished"""
    curve: Series = field(default_factory=dict)
    fates: Sequence[str] = ()
    """what became of each edit, in words"""
    missed: Sequence[Missed] | None = None
    """None where the model was not asked"""
    events: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """name of an event log -> its events"""
    adapted: int = 0
    """modules with an adapter beside their weights, without which the model was asked"""

    def to_html(self) -> str:
        """The page."""
        parts = [
            f"<h1>{escape(self.title)}</h1>",
            f'<p class="sub">{escape(self._subtitle())}</p>',
            *self._metrics(),
            *self._curves(),
            *self._missed(),
            *self._fates(),
            *(part for name, events in self.events.items() for part in _events(name, events)),
            "<h2>Recipe</h2>",
            f"<details><summary>All settings of the model, the data and the callbacks</summary>"
            f"<pre>{escape(self.settings)}</pre></details>" if self.settings else "<p>No config.yaml lies there.</p>",
        ]  # fmt: skip
        return PAGE.format(title=escape(self.title), style=STYLE, body="\n".join(parts))

    def _subtitle(self) -> str:
        if self.summary is None:
            return "This run has not finished; --ckpt_path last goes on from its last batch."
        s = self.summary
        undone = "".join(f", {s[k]} {k.replace('_', ' ')}" for k in ("rolled_back", "superseded") if s.get(k))
        told = [f"{s['edits']} facts edited{undone}"]
        told[0] += f" in {counted(s['batches'], 'batch', 'batches')}" if "batches" in s else ""
        told += [f"{s['seconds']:.0f} s"] if "seconds" in s else []
        told += [f"seed {s['seed']}"] if "seed" in s else []
        versions = ", ".join(f"{name} {version}" for name, version in s.get("versions", {}).items())
        return f"{'; '.join(told)}. {versions}."

    def _metrics(self) -> Iterable[str]:
        if self.summary is None:
            return
        yield "<h2>Before, right after, and at the end</h2>"
        rows = []
        for name in NAMES:
            cells = [self.summary.get(group, {}).get(name) for group in GROUPS]
            if any(cell is not None for cell in cells):
                rows.append([name, *("" if cell is None else f"{cell:.3f}" for cell in cells)])
        for title, key in (("held-out perplexity", "perplexity"), ("generation entropy", "generation_entropy")):
            found = self.summary.get(key) or {}
            if found:
                cells = [found.get(when) for when in ("before", "", "after")]
                rows.append([title, *("" if cell is None else f"{cell:.2f}" for cell in cells)])
        yield table(["", *GROUPS], rows, numbers=range(1, 4))

    def _curves(self) -> Iterable[str]:
        if not self.curve:
            return
        before, immediate = (
            {n: {k.partition("/")[2]: v for k, v in row.items() if k.startswith(f"{group}/")}
             for n, row in self.curve.items()}
            for group in ("before", "immediate")
        )  # fmt: skip
        retained = {n: row for n, row in self.curve.items() if any(k.startswith("retained/") for k in row)}
        perplexity = ((self.summary or {}).get("perplexity") or {}).get("before")
        drawn = io.StringIO()
        forgetting_figure(retained, before, immediate, perplexity).savefig(drawn, format="svg")
        svg = drawn.getvalue()
        yield "<h2>Over the edits</h2>"
        yield f'<figure aria-label="forgetting curves">{svg[svg.index("<svg") :]}</figure>'

    def _missed(self) -> Iterable[str]:
        yield "<h2>Edits that the model does not hold</h2>"
        if self.missed is None:
            yield "<p>The model was not asked (--no_answers).</p>"
            return
        forgotten = sum(one.learnt for one in self.missed)
        yield (
            f"<p>{forgotten} forgotten, {len(self.missed) - forgotten} never learnt, by accuracy: every token of the "
            "target is the likeliest.</p>"
        )
        if self.adapted:
            yield (
                f"<p>The model was asked without the adapter that the run keeps beside the weights of {self.adapted} "
                "modules; the metrics were measured with it.</p>"
            )
        if self.missed:
            rows = [
                [str(m.number), str(m.batch), m.prompt, m.target, m.answer, "forgotten" if m.learnt else "never learnt"]
                for m in self.missed
            ]
            yield table(["edit", "batch", "prompt", "target", "the model says", ""], rows, numbers=(0, 1))

    def _fates(self) -> Iterable[str]:
        counts = Counter(" ".join(fate.split()[:2]) if fate != "kept" else fate for fate in self.fates)
        if set(counts) - {"kept"}:
            yield "<h2>What became of the edits</h2>"
            rows = [[fate.removesuffix(" by").removesuffix(" to"), str(count)] for fate, count in counts.most_common()]
            yield table(["", "edits"], rows, numbers=(1,))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """An HTML table; texts are escaped, and columns in ``numbers`` stand to the right."""
    right = set(numbers)

    def row(cells: Sequence[str], tag: str) -> str:
        marked = (f'<{tag} class="n">' if i in right else f"<{tag}>" for i in range(len(cells)))
        return "<tr>" + "".join(f"{m}{escape(c)}</{tag}>" for m, c in zip(marked, cells, strict=True)) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table>\n<thead>{row(header, "th")}</thead>\n<tbody>{body}</tbody></table></div>'


def _events(name: str, events: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    """How often each decision of a log was taken, and those that did not let things be."""
    events = [event for event in events if "decision" in event]  # another program's log may be of that name
    counts = Counter(str(event["decision"]) for event in events)
    if not counts:
        return
    yield f"<h2>{escape(name.removesuffix('_events').replace('_', ' ').capitalize())}</h2>"
    yield "<p>" + escape(", ".join(f"{count} {decision}" for decision, count in counts.most_common())) + "</p>"
    told = [event for event in events if event["decision"] != "keep"]
    if told:
        rows = [
            [str(event["step"] + 1), str(event["decision"]), _number(event.get("score")), _reason(event)]
            for event in told
        ]
        yield table(["batch", "decision", "score", "reason"], rows, numbers=(0, 2))


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, (int, float)) else ""


def _reason(event: Mapping[str, Any]) -> str:
    fact = event.get("fact")
    told = f"{fact.get('subject')}: {fact.get('target_new')}" if isinstance(fact, Mapping) else ""
    return str(event.get("reason") or told)
