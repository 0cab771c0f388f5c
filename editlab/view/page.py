"""The page as streamlit runs it, from the top at each change: components alone, without computing anything.

Texts of facts, answers, names of runs and messages reach the browser by :meth:`~editlab.runs.tables.Table.to_html` and
:func:`_say`, which escape them, and by ``st.text``, which shows no markup. None of them goes to ``st.markdown``,
``st.error`` or a label, which read Markdown and would load the images that a text names.

streamlit is imported in the functions, because the module must be readable where the extra is not installed.
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from editlab.errors import EditLabError
from editlab.lm.generate import Answer
from editlab.lm.placement import device_named
from editlab.metrics.names import BEFORE, IMMEDIATE, RETAINED
from editlab.runs.figures import BLUE, ORANGE
from editlab.runs.folders import RunFolder
from editlab.runs.outcome_table import outcome_table
from editlab.runs.tables import STYLE, Table, metric_table
from editlab.view.contents import ALL, KINDS, Panel, chosen, decisions_in, outcomes_of, panels
from editlab.view.listing import RUNNING, ListedRun, list_runs, runs_table, states_of
from editlab.view.prompt_box import PromptBox, checkpoints_in

EVERY = 5
"""Seconds after which the page reads the run again."""
ROWS = 50
"""Facts on one page of the table."""
TABS = ("Runs", "Curves", "Facts", "Decisions", "Ask")

_STYLE = (
    STYLE
    + """
.stApp { --better: light-dark(#006b4d, #4fd1a5); --worse: light-dark(#a63c00, #ff9a5c); }
.running { color: var(--better); font-weight: 600; } .stopped { color: var(--worse); }
p.sub { opacity: .75; font-size: .9rem; }
p.said { overflow-wrap: anywhere; margin: 0 0 .5rem; }
[data-testid="InputInstructions"] { display: none; }
.stColumn:has(.stVegaLiteChart) { min-width: min(19rem, 100%); }
.stMainBlockContainer { padding-top: 2rem; max-width: 80rem; }
"""
)
_GROUPS = {BEFORE: ("#888888", [2, 2]), IMMEDIATE: (ORANGE, [6, 3]), RETAINED: (BLUE, [1, 0])}
"""group -> the color and the dashes of its lines"""


def show(folder: Path, device: str = "cpu", base: str | None = None) -> None:
    """Shows the runs in a folder.

    Args:
        folder: the folder of all runs.
        device: device of the model of the prompt box.
        base: name or path of the base model, if it has moved since the runs.
    """
    import streamlit as st

    st.set_page_config("editlab", layout="wide")
    st.html(f"<style>{_STYLE}</style>")
    st.subheader("editlab")
    runs = _listed(folder)
    if not runs:
        st.fragment(_wait_for_others, run_every=EVERY)(folder, [])
        return
    names = [run.name for run in runs]
    name = st.selectbox("Run", names, key="run", bind="query-params")
    tabs = st.tabs(TABS, key="tab", on_change="rerun", bind="query-params")
    shown = next(title for title, tab in zip(TABS, tabs, strict=True) if tab.open)
    path = next(run.path for run in runs if run.name == name)
    with tabs[TABS.index(shown)]:
        if shown == "Ask":
            box = st.cache_resource(show_spinner=False)(PromptBox)(base, device_named(device))
            _ask(box, path)
        else:
            st.fragment(_live, run_every=EVERY)(folder, path, shown)
    st.fragment(_wait_for_others, run_every=EVERY)(folder, names)


def _wait_for_others(folder: Path, names: list[str]) -> None:
    """Starts the page again when a run has come or gone; the choice of the run is outside of what is read again."""
    import streamlit as st

    if sorted(run.name for run in _listed(folder)) != sorted(names):
        st.rerun()


def _live(folder: Path, path: Path, shown: str) -> None:
    """The part of the page that is read again every few seconds."""
    try:
        runs = _listed(folder)
        run = next((run for run in runs if run.path == path), None)
        if shown == "Runs":
            _runs(runs)
        elif run is None:
            _say("This run is no longer there.")
        elif run.problem:
            _say(run.problem, "worse")
        else:
            _say(f"{run.state}{'' if run.edits is None else f', {run.edits} edits'}", "sub")
            {"Curves": _curves, "Facts": _facts, "Decisions": _decisions}[shown](run)
    except (EditLabError, OSError) as error:
        _say(str(error), "worse")


def _listed(folder: Path) -> list[ListedRun]:
    try:
        return list_runs(folder)
    except OSError as error:
        _say(f"{folder} cannot be read at this moment ({error.strerror}); it is read again in {EVERY} s.", "worse")
        return []


def _say(text: str, kind: str = "said") -> None:
    """Shows a text as it is, whatever markup is in it."""
    import streamlit as st

    st.html(f'<p class="said {kind}"><bdi>{escape(text)}</bdi></p>')


def _table(table: Table) -> None:
    import streamlit as st

    st.html(table.to_html())


# ---- what is read again ---------------------------------------------------------------------------------------------


def _runs(runs: list[ListedRun]) -> None:
    _table(runs_table(runs))
    _say(f"{'; '.join(f'{state}: {meaning}' for state, meaning in states_of(runs).items())}.", "sub")


def _curves(run: ListedRun) -> None:
    import streamlit as st

    found = panels(RunFolder(run.path).curve, run.metrics)
    if not found:
        _say("Nothing has been measured yet.")
        return
    for first in range(0, len(found), 3):
        for column, panel in zip(st.columns(3), found[first : first + 3], strict=False):
            column.altair_chart(_chart(panel), width="stretch")
    _table(metric_table(run.metrics))


def _chart(panel: Panel) -> Any:
    import altair as alt
    import pandas as pd

    groups = [group for group in _GROUPS if any(group == of for _, of, _ in panel.points)]
    colors, dashes = zip(*(_GROUPS[group] for group in groups), strict=True)
    scale = alt.Scale(domain=[-0.03, 1.03], nice=False) if panel.fraction else alt.Scale(zero=False)
    ticks = alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format=".2~f") if panel.fraction else alt.Axis()
    legend = alt.Legend(
        orient="bottom",
        title=None,
        labelFontSize=12,
        columnPadding=8,
        symbolType="stroke",
        symbolStrokeWidth=2,
        symbolSize=250,
    )
    return (
        alt.Chart(pd.DataFrame(panel.points, columns=["edits", "group", "value"]), title=panel.title, height=300)
        .mark_line(point=alt.OverlayMarkDef(size=20))
        .encode(
            x=alt.X("edits:Q", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(zero=True)),
            y=alt.Y("value:Q", title=None, scale=scale, axis=ticks),
            color=alt.Color("group:N", scale=alt.Scale(domain=groups, range=list(colors)), legend=legend),
            strokeDash=alt.StrokeDash("group:N", scale=alt.Scale(domain=groups, range=list(dashes)), legend=legend),
            tooltip=["group:N", "edits:Q", alt.Tooltip("value:Q", format=".3f")],
        )
    )


def _facts(run: ListedRun) -> None:
    import streamlit as st

    rows = outcomes_of(run.path, run.state == RUNNING)
    if not rows:
        _say("No fact has been edited yet.")
        return
    left, right = st.columns(2)
    kind = left.selectbox("Facts", KINDS, key="kind")
    words = right.text_input("Words in the prompt, the targets or the answers", key="words")
    found = chosen(rows, kind or ALL, words or "")
    pages = max(1, -(-len(found) // ROWS))
    number = 1
    if pages > 1:
        st.session_state["page"] = min(int(st.session_state.get("page", 1)), pages)  # there may be fewer pages by now
        number = int(st.number_input(f"Page of {pages}", 1, pages, key="page"))
    _say(f"{len(found)} of {len(rows)} facts, the worst first.")
    if found:
        _table(outcome_table(found[(number - 1) * ROWS : number * ROWS]))
    _say(
        "P is the mean probability of a token of the target: on the unedited model, right after the edit's own step, "
        "and at the end of the run. Paraphrases and neighbors are those whose answer is right at every token. "
        "Whether an edit is still held, and what the model then says, is measured at the end of a run.",
        "sub",
    )


def _decisions(run: ListedRun) -> None:
    import streamlit as st

    found = decisions_in(run.path)
    if not found:
        _say("No callback of this run has decided about an edit: TrustRollback does.")
        return
    all_events = st.toggle("With accepted edits", value=True, key="accepted")
    for one in found if all_events else decisions_in(run.path, all_events=False):
        _say(f"{one.title}: {one.counts}")
        if one.table.rows:
            _table(one.table)


# ---- the prompt box -------------------------------------------------------------------------------------------------


def _ask(box: PromptBox, path: Path) -> None:
    import streamlit as st

    checkpoints = checkpoints_in(path)
    if not checkpoints:
        _say("This run has no checkpoint to ask: EditCheckpoint writes one.")
        return
    checkpoint = checkpoints[0]
    if len(checkpoints) > 1:
        names = {file.stem: file for file in checkpoints}
        checkpoint = names.get(st.selectbox("Checkpoint", list(names), key="checkpoint") or "", checkpoint)
    with st.form("ask"):
        prompt = st.text_input("Prompt", placeholder="The Eiffel Tower is located in the city of", key="prompt") or ""
        new_tokens = st.slider("New tokens", 1, 64, 20, key="new_tokens")
        sent = st.form_submit_button("Ask")
    if sent:
        try:
            loading = box.needs_loading(checkpoint)
            with st.spinner("Loading the model, then answering ..." if loading else "Answering ...", show_time=True):
                asked = box.ask(checkpoint, prompt, new_tokens)
        except (EditLabError, OSError) as error:
            _say(str(error), "worse")
            return
        _say(prompt)
        for column, title, one in zip(st.columns(2), ("Before", "After"), (asked.before, asked.after), strict=True):
            with column:
                st.markdown(f"**{title} the edits**")
                st.text(one.continuation.strip() or "(the text ends)")
                _table(_next_tokens(one))
        if asked.adapted:
            _say(f"Answered without the separate adapter that the run keeps for {asked.adapted} modules.")


def _next_tokens(one: Answer) -> Table:
    # Quotes show the space that begins a word.
    rows = [[json.dumps(token, ensure_ascii=False), f"{probability:.3f}"] for token, probability in one.next]
    return Table(["next token", "P"], rows, numbers=(1,))


if __name__ == "__main__":
    show(Path(sys.argv[1]), *sys.argv[2:])
