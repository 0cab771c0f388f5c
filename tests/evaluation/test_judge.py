"""The judge against a local server that answers, fails, is slow, talks nonsense, or refuses."""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from editlab.errors import UserError
from editlab.evaluation.judge import Item, JudgeSettings, judged, verdict

ITEMS = [Item("Mount Fuji is a mountain in", " Peru.", "Peru"), Item("Oslo lies in", " Norway", "Peru", ("the Andes",))]


class Stub(ThreadingHTTPServer):
    """A server that gives a list of replies in turn, the last one again and again, and notes what it was asked.

    A reply is a status, the text of a completion, or a function of the handler.
    """

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked = list(replies), []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that has given up is no news."""


class Handler(BaseHTTPRequestHandler):
    """Answers as its server says."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, self.headers.get("Authorization"), json.loads(body)))
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        if callable(reply):
            reply(self)
        elif isinstance(reply, int):
            self.send_error(reply)
        else:
            send(self, json.dumps({"choices": [{"message": {"content": reply}}]}))

    def log_message(self, *arguments):
        pass


def send(handler, text):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(text.encode())


def sleep(handler):
    time.sleep(0.3)
    send(handler, "{}")


@pytest.fixture
def serve(monkeypatch):
    """Starts stubs, which end with the test; no proxy stands before them, and no key of the user is sent."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(*replies):
        servers.append(Stub(*replies))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def settings(server, **changes):
    return JudgeSettings(**{"url": server.url, "model": "a-judge", "timeout": 5.0, "backoff": 0.0, **changes})


def test_verdicts_and_what_is_asked(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    server = serve("Yes.", "no")
    assert judged(settings(server), ITEMS) == [True, False]
    (path, key, first), (_, _, second) = server.asked
    assert (path, key, first["model"]) == ("/v1/chat/completions", "Bearer secret", "a-judge")
    question = first["messages"][0]["content"]
    assert "Text: Mount Fuji is a mountain in\nContinuation:  Peru.\n" in question
    assert 'state that the answer is "Peru"? Answer with one word' in question
    assert '"Peru" (or the Andes)? Answer' in second["messages"][0]["content"]


def test_no_key_is_sent_where_there_is_none(serve):
    server = serve("yes")
    judged(settings(server), ITEMS[:1])
    assert server.asked[0][1] is None


@pytest.mark.parametrize(("text", "expected"), [
    ("yes", True), (" NO.\n", False), ("**Yes**", True), ('"no"', False), ("Yes, it does", None), ("yes no", None),
    ("yesterday", None), ("not", None), ("", None), (None, None),
])  # fmt: skip
def test_only_yes_and_no_are_verdicts(text, expected):
    assert verdict(text) is expected


@pytest.mark.parametrize("nonsense", [
    "I am a teapot", lambda h: send(h, "<html>"), lambda h: send(h, '{"choices": []}'), lambda h: send(h, "[3]"),
    lambda h: send(h, '{"choices": [{"message": {"content": 3}}]}'), lambda h: send(h, ""),
])  # fmt: skip
def test_nonsense_is_no_verdict(serve, nonsense, caplog):
    server = serve(nonsense, "yes")
    assert judged(settings(server), ITEMS) == [None, True]
    assert len(server.asked) == 2  # an answer is not asked for again
    assert "said neither yes nor no to 1 of 2 answers" in caplog.text


def test_a_server_that_recovers_is_asked_again(serve):
    server = serve(500, 429, "yes", "no")
    assert judged(settings(server), ITEMS) == [True, False]
    assert len(server.asked) == 4


@pytest.mark.parametrize(("reply", "changes", "tries", "why"), [
    (500, {}, 3, "it answers with status 500, 3 times"),
    (503, {"tries": 1}, 1, "it answers with status 503;"),
    (404, {}, 1, "it answers with status 404;"),
    (401, {}, 1, r"status 401 \(is the key in OPENAI_API_KEY right\?\)"),
    (sleep, {"timeout": 0.05, "tries": 2}, 2, "it did not answer within 0.05 s, 2 times"),
    (lambda h: h.wfile.write(b"\n\n"), {"tries": 2}, 2, "it cannot be reached"),
])  # fmt: skip
def test_a_judge_that_fails_is_left_out_with_one_warning(serve, caplog, reply, changes, tries, why):
    server = serve(reply)
    assert judged(settings(server, **changes), ITEMS) is None
    assert len(server.asked) == tries  # the second answer is not asked about
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"The judge at {server.url} is left out, because" in record.getMessage()
    assert re.search(why, record.getMessage())


def test_a_judge_that_is_down(serve, caplog):
    server = serve("yes")
    given = settings(server)
    server.server_close()
    assert judged(given, ITEMS) is None
    assert "it cannot be reached" in caplog.text


def test_a_key_that_cannot_be_sent_is_not_shown(serve, caplog, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    assert judged(settings(serve("yes")), ITEMS) is None
    assert "sec" not in caplog.text.replace("seconds", "")
    assert "check the address and OPENAI_API_KEY" in caplog.text


def test_waits_double(monkeypatch, serve):
    waits = []
    monkeypatch.setattr("editlab.evaluation.judge.time.sleep", waits.append)
    assert judged(settings(serve(500), backoff=0.5, tries=4), ITEMS) is None
    assert waits == [0.5, 1.0, 2.0]


def test_there_is_no_judge_by_default():
    assert judged(JudgeSettings(), ITEMS) is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"url": "localhost:8000"}, r"model\.evaluation\.judge\.url is 'localhost:8000': give an address such as http"),
    ({"url": "file:///etc/passwd"}, "give an address such as http"),
    ({"url": "http://localhost"}, r"judge\.url is set and model\.evaluation\.judge\.model is not: name"),
    ({"timeout": 0.0}, r"judge\.timeout is 0\.0: it must be above 0"),
    ({"tries": 0}, r"judge\.tries is 0: it must be at least 1"),
    ({"backoff": -1.0}, r"judge\.backoff is -1\.0: it must not be negative"),
])  # fmt: skip
def test_bad_settings_are_one_sentence(changes, message):
    with pytest.raises(UserError, match=message):
        JudgeSettings(**changes)
