"""Starting the server: the port, the settings that keep it on this machine, and the missing extra."""

import socket
from pathlib import Path

import pytest

from editlab.errors import UserError
from editlab.utils import compat
from editlab.view import serving


def test_a_port_that_is_used_or_is_none():
    with socket.socket() as other:
        other.bind((serving.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"Port {port} cannot be used \(.*\): give another --port, or 0\."):
            serving.free_port(port)
    assert serving.free_port(port) == port
    assert serving.free_port(0) > 0
    for wrong in (-1, 65536):
        with pytest.raises(UserError, match=f"--port is {wrong}: give a number from 0"):
            serving.free_port(wrong)


def test_the_page_is_served_on_this_machine_alone(tmp_path):
    words = serving.command_line(tmp_path, 1234, "cpu", "-a model")
    assert words[0] == "run"
    assert Path(words[1]).name == "page.py"
    assert Path(words[1]).is_file()
    options = words[2 : words.index("--")]
    assert {"--server.address=127.0.0.1", "--server.port=1234", "--browser.gatherUsageStats=false"} <= {*options}
    assert [option for option in options if "Hosts" in option] == [
        "--server.allowedHosts=127.0.0.1", "--server.allowedHosts=localhost",
    ]  # fmt: skip
    assert words[words.index("--") + 1 :] == [str(tmp_path), "cpu", "-a model"]


def test_streamlit_has_these_settings():
    config = pytest.importorskip("streamlit.config", reason="streamlit is not installed (editlab[view])")
    for name in (*serving.OPTIONS, "server.allowedHosts"):
        config.get_option(name)  # raises for one that does not exist


def test_refusing_another_site_asks_no_server(monkeypatch):
    util = pytest.importorskip("streamlit.net_util", reason="streamlit is not installed (editlab[view])")
    for name in ("_external_ip", "_internal_ip"):
        monkeypatch.setattr(util, name, None)
    monkeypatch.setattr(util, "_make_blocking_http_get", lambda *_, **__: pytest.fail("a server was asked"))
    compat.set_own_addresses(serving.HOST)
    assert util.get_external_ip() == util.get_internal_ip() == serving.HOST


def test_the_missing_extra(monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package streamlit: pip install 'editlab\[view\]'"):
        serving.require_streamlit()
