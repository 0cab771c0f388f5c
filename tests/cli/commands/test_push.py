"""``push`` against a hub that listens on this machine only, through the real client of huggingface_hub."""

from __future__ import annotations

import base64
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi

from editlab.cli.main import main
from editlab.runs import hub
from editlab.runs.model_card import PLACE, TAGS

CARD = f'---\n{TAGS}\n---\nmodel = AutoModelForCausalLM.from_pretrained("{PLACE}")\n'


class Hub(ThreadingHTTPServer):
    """The part of the hub that a push uses: it takes all files as text in the commit, and notes what it gets."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked, self.files, self.there = [], {}, []
        self.private, self.refuses = False, None

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    """What the stand-in answers."""

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        self.answer(self.rfile.read(int(self.headers["Content-Length"])))

    def answer(self, body):
        hub = self.server
        hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
        if hub.refuses:
            return self.send(hub.refuses, {"error": "no"})
        if self.path.endswith("/repos/create"):
            hub.created = json.loads(body)
            return self.send(200, {"url": f"{hub.address}/me/edited"})
        if self.path.endswith("/validate-yaml"):
            return self.send(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self.send(200, {"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    hub.message = line["value"]["summary"]
                else:
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.send(200, {"commitUrl": f"{hub.address}/me/edited/commit/{'a' * 40}", "commitOid": "a" * 40})
        if "/tree/" in self.path:
            return self.send(200, [{"type": "file", "path": n, "size": 1, "oid": "0" * 40} for n in hub.there])
        siblings = [{"rfilename": name} for name in hub.there]
        return self.send(200, {"id": "me/edited", "private": hub.private, "siblings": siblings})

    def send(self, status, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def stub(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint=server.address))
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def edited(tmp_path):
    folder = tmp_path / "edited"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def push(*arguments):
    return main(["push", *map(str, arguments)])


def test_the_files_of_an_export_are_pushed_in_one_commit(stub, edited, capsys):
    (edited / "notes.docx").write_text("mine")
    (edited / ".env").write_text("SECRET=1")
    assert push(edited, "me/edited", "--message", "First") == 0
    assert stub.files == {
        "README.md": CARD.replace(PLACE, "me/edited").encode(),
        "config.json": b"{}",
        "model.safetensors": bytes(range(256)),
        "tokenizer.json": b"{}",
    }
    assert stub.message == "First"
    assert stub.created["name"] == "edited"
    assert not stub.created.get("private")
    assert stub.created.get("visibility") != "private"
    assert sum("/commit/" in path for _, path, _ in stub.asked) == 1
    assert {token for _, path, token in stub.asked if "validate-yaml" not in path} == {"Bearer hf_made_up"}
    said = capsys.readouterr().out
    assert "not pushed, as they are no part of an export: .env, notes.docx" in said
    assert f"4 files, 0.0 MB, pushed to {stub.address}/me/edited" in said
    assert PLACE in (edited / "README.md").read_text()  # the folder is as it was


@pytest.mark.parametrize("name", ["model.gguf", "delta.safetensors"])
def test_a_gguf_file_and_a_delta_are_exports_too(stub, edited, name):
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (edited / file).unlink()
    (edited / name).write_bytes(b"1")
    stub.there = ["model.safetensors"]  # of the same model, as a folder: both may be in one repository
    assert push(edited, "me/edited") == 0
    assert set(stub.files) == {"README.md", name}


def test_a_private_repository(stub, edited, capsys):
    stub.private = True
    assert push(edited, "me/edited", "--private") == 0
    assert stub.created.get("private") or stub.created["visibility"] == "private"
    stub.private, stub.files = False, {}
    assert push(edited, "me/edited", "--private") == 2
    assert "me/edited exists and is public: make it private" in capsys.readouterr().err
    assert stub.files == {}


def test_what_is_refused(stub, edited, tmp_path, monkeypatch, capsys):
    run, empty, strange = tmp_path / "run", tmp_path / "empty", tmp_path / "strange"
    (run / "checkpoints").mkdir(parents=True)
    empty.mkdir()
    strange.mkdir()
    for name in ("config.json", "model.safetensors"):
        (strange / name).write_bytes((edited / name).read_bytes())
    for folder, repo, message in (
        (tmp_path / "none", "me/edited", "There is no folder"),
        (run, "me/edited", f"only updates: export it first, by `editlab export --ckpt_path {run} --out edited`"),
        (empty, "me/edited", "holds no model and no delta"),
        (strange, "me/edited", "has no model card of editlab's"),
        (edited, "me/my/edited", "'me/my/edited' is no name of a repository"),
    ):  # fmt: skip
        assert push(folder, repo) == 2, folder
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert message in said[0]
    stub.there = ["model-00001-of-00002.safetensors"]
    assert push(edited, "me/edited") == 2
    assert "me/edited holds model-00001-of-00002.safetensors of another model" in capsys.readouterr().err
    assert stub.files == {}
    stub.refuses = 403
    assert push(edited, "you/edited") == 2
    assert "The hub does not let this token write to you/edited: log in" in capsys.readouterr().err
    stub.refuses, before = None, len(stub.asked)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert push(edited, "me/edited") == 2
    assert capsys.readouterr().err == (
        "editlab: There is no token of the hub: log in with `hf auth login`, or set HF_TOKEN.\n"
    )
    assert len(stub.asked) == before


def test_a_hub_that_fails_or_is_away(stub, edited, monkeypatch, capsys):
    stub.refuses = 400
    assert push(edited, "me/edited") == 1
    assert "The hub refused the upload to me/edited (" in capsys.readouterr().err
    closed = HfApi(endpoint="http://127.0.0.1:1")
    monkeypatch.setattr(hub, "HfApi", lambda **_: closed)
    assert push(edited, "me/edited") == 1
    assert "The hub cannot be reached to push me/edited: connect" in capsys.readouterr().err
