"""Copying what ships with editlab."""

from editlab.cli.main import main
from editlab.utils.shipped import shipped_folder


def test_a_recipe_is_copied_and_not_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["cp", "rome"]) == 0
    assert capsys.readouterr().out == "rome.yaml\n"
    assert (tmp_path / "rome.yaml").read_bytes() == (shipped_folder() / "rome.yaml").read_bytes()
    assert main(["cp", "rome"]) == 2
    assert capsys.readouterr().err == (
        "editlab: rome.yaml exists, and is not overwritten: name another folder, or use --force.\n"
    )
    assert main(["cp", "rome", "--force"]) == 0
    assert main(["cp", "rom", "there"]) == 2
    assert "did you mean rome" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rome.yaml"]
