"""The page in a real browser, wide and narrow, with facts that are full of markup; and by streamlit's own tester.

The browser's test is heavy and left out by default; both are skipped where streamlit or Chromium is not installed.
"""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest

from editlab.errors import UserError
from editlab.lm.generate import Answer
from editlab.view import serving
from editlab.view.prompt_box import Asked, PromptBox
from tests.view.browser import CHROMIUM, Browser

EVIL = "<script>alert(1)</script> <img src=x onerror=alert(2)> ![picture](http://127.0.0.1:9/seen) **bold** :red[x]"
COLUMNS = (
    "edit", "id", "subject", "prompt", "target_new", "target_true", "step", "status", "factor", "before/logp_new",
    "before/generated", "immediate/logp_new", "immediate/hit", "retained/logp_new", "retained/hit",
    "retained/generated",
)  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A folder with one finished run, all of whose texts are markup."""
    pytest.importorskip("streamlit", reason="streamlit is not installed (editlab[view])")
    folder = tmp_path / "runs" / "<b>bold" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "edits,before/accuracy,immediate/accuracy,retained/accuracy,retained/perplexity\n1,0,1,,\n2,0,1,0.5,12.5\n"
    )
    metrics = {"before/accuracy": 0.0, "retained/accuracy": 0.5, "before/perplexity": 12.0, "retained/perplexity": 12.5}
    (folder / "summary.json").write_text(json.dumps({"edits": 2, "metrics": metrics}))
    with (folder / "outcomes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for edit in range(1, 61):  # two pages
            writer.writerow([edit, edit, f"Oslo {EVIL}", "{} lies in", EVIL, EVIL, 0, "kept", 1.0, -2, EVIL, -0.5, 1,
                             -1 / edit, edit % 2, EVIL])  # fmt: skip
    event = {"step": 0, "kind": "batch", "decision": "rollback", "score": 0.1, "threshold": 0.5, "reason": EVIL}
    (folder / "trust_events.jsonl").write_text(json.dumps(event) + "\n")
    broken = tmp_path / "runs" / "broken" / "version_0"
    broken.mkdir(parents=True)
    (broken / "metrics.csv").write_text("edits,x\nmany,\n")
    return tmp_path / "runs"


def script(folder):
    """What streamlit runs, for its tester."""
    from pathlib import Path

    from editlab.view.page import show

    show(Path(folder))


@pytest.mark.parametrize("tab", ["Runs", "Curves", "Facts", "Decisions", "Ask"])
def test_every_tab_without_a_browser(root, tab):
    from streamlit.testing.v1 import AppTest

    page = AppTest.from_function(script, args=(str(root),), default_timeout=60)
    page.query_params["tab"], page.query_params["run"] = tab, "<b>bold/version_0"
    page.run()
    assert not page.exception
    assert sorted(page.selectbox(key="run").options) == ["<b>bold/version_0", "broken/version_0"]
    html = "".join(element.proto.body for element in page.get("html"))
    assert "<script" not in html
    assert "<img" not in html
    assert "<b>" not in html
    assert {"Facts": "60 of 60 facts", "Decisions": "1 rolled back", "Curves": "12.50", "Ask": "EditCheckpoint",
            "Runs": "damaged"}[tab] in html  # fmt: skip


def test_pages_of_facts(root):
    from streamlit.testing.v1 import AppTest

    page = AppTest.from_function(script, args=(str(root),), default_timeout=60)
    page.query_params["tab"], page.query_params["run"] = "Facts", "<b>bold/version_0"
    rows = lambda: sum(element.proto.body.count("<tr>") for element in page.get("html")) - 1
    page.run()
    assert rows() == 50
    page.number_input(key="page").set_value(2).run()
    assert rows() == 10
    page.text_input(key="words").set_value("lies in").run()  # the same facts
    assert rows() == 10
    page.selectbox(key="kind").set_value("forgotten").run()  # the 30 of even number: one page
    assert rows() == 30
    assert not page.exception


def test_answers_and_messages_are_texts(root, monkeypatch):
    from streamlit.testing.v1 import AppTest

    (root / "<b>bold" / "version_0" / "checkpoints").mkdir()
    (root / "<b>bold" / "version_0" / "checkpoints" / "last.ckpt").touch()

    def ask(box, checkpoint, prompt, new_tokens):
        if prompt == "fail":
            raise UserError(EVIL)
        return Asked(Answer(EVIL, ((EVIL, 0.5),)), Answer("", ()), 0)

    monkeypatch.setattr(PromptBox, "needs_loading", lambda *_: True)
    monkeypatch.setattr(PromptBox, "ask", ask)
    page = AppTest.from_function(script, args=(str(root),), default_timeout=60)
    page.query_params["tab"], page.query_params["run"] = "Ask", "<b>bold/version_0"
    page.run()
    for prompt, texts in ((EVIL, [EVIL, "(the text ends)"]), ("fail", [])):
        page.text_input(key="prompt").set_value(prompt)
        page.button[0].click().run()
        assert not page.exception
        assert [text.value for text in page.text] == texts  # streamlit's own element without markup
        html = "".join(element.proto.body for element in page.get("html"))
        assert html.count("&lt;script&gt;") == len(texts) or prompt == "fail"
        assert "<script" not in html
        assert "<img" not in html
    assert "![picture]" not in "".join(element.value for element in page.markdown)


@pytest.fixture
def address(root):
    """Address of a server of its own, as the command starts it."""
    port = serving.free_port(0)
    server = subprocess.Popen([sys.executable, "-m", "editlab", "view", str(root), "--port", str(port)])
    url = f"http://{serving.HOST}:{port}"
    for _ in range(1200):  # a busy machine takes a minute to import everything
        with suppress(OSError), urllib.request.urlopen(url):
            break
        time.sleep(0.1)
    yield url
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=60) in (0, 128 + signal.SIGINT)


@pytest.fixture
def browser(tmp_path):
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    window = Browser(tmp_path / "profile")
    yield window
    window.close()


@pytest.mark.thorough
@pytest.mark.skipif(os.name == "nt", reason="the server is stopped by SIGINT")
def test_texts_are_texts_in_a_browser_wide_and_narrow(address, browser):
    browser.open(f"{address}/?run=%3Cb%3Ebold%2Fversion_0&tab=Facts")
    browser.wait_for("60 of 60 facts")
    browser.wait_for(f"Oslo {EVIL} lies in")
    assert browser.text().count(EVIL) == 50 * 4  # prompt, target and two answers of each fact of a page
    browser.click("Decisions", "[role=tab]")
    browser.wait_for(EVIL)
    browser.wait_for("trust: 1 rolled back")
    browser.click("Curves", "[role=tab]")
    browser.wait("document.querySelectorAll('.vega-embed canvas, .vega-embed svg').length === 2")
    browser.click("Ask", "[role=tab]")
    browser.wait_for("This run has no checkpoint to ask")
    browser.click("Runs", "[role=tab]")
    browser.wait_for("<b>bold/version_0")
    for tab in ("Runs", "Facts", "Decisions", "Curves"):
        browser.click(tab, "[role=tab]")
        for width in (1400, 390):
            browser.resize(width, 850)
            browser.wait(f"window.innerWidth === {width} && !document.querySelector('[data-stale=true]')")
            assert browser.overflow() == 0, (tab, width)
    assert browser.dialogs == []  # no script ran
    assert browser.value("document.querySelectorAll('img[src=x], .stHtml script, .stHtml b').length") == 0
    asked = {"/".join(url.split("/")[:3]) for url in browser.requests if not url.startswith(("data:", "blob:"))}
    assert asked == {address, address.replace("http", "ws")}  # no font, no telemetry, no picture that a fact names
    port = int(address.rpartition(":")[2])
    require_refused(f"127.0.0.1:{port}", port, "http://evil.example")  # a page of another site
    require_refused(f"evil.example:{port}", port, None)  # another name that someone has given this machine
    require_refused(f"evil.example:{port}", port, f"http://evil.example:{port}")


def require_refused(name, port, origin):
    """The server at a port refuses a connection under a name and from a page of an origin."""
    from websockets.exceptions import InvalidStatus
    from websockets.sync.client import connect

    refused = pytest.raises(InvalidStatus, match="403")
    sock = socket.create_connection((serving.HOST, port))
    with sock, refused, connect(f"ws://{name}/_stcore/stream", sock=sock, origin=origin):
        pass
