"""Starting the page's server: streamlit, bound to this machine, without telemetry and without any other server."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from editlab.errors import UserError
from editlab.runs.figures import BLUE, SKY
from editlab.utils import compat

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
"""The only address on which the page is served."""
PORT = 8501
"""Default port."""

OPTIONS = {
    "server.address": HOST,
    "server.enableCORS": "true",
    "server.enableXsrfProtection": "true",
    "server.headless": "true",  # opens no browser and asks for no e-mail address
    "server.fileWatcherType": "none",  # the page's own source does not change while it is served
    "browser.serverAddress": HOST,
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "client.showErrorLinks": "false",
    "logger.hideWelcomeMessage": "true",
    "runner.magicEnabled": "false",
    "theme.light.primaryColor": BLUE,
    "theme.dark.primaryColor": SKY,
}
"""Settings of streamlit, which take precedence over the user's own."""

HOSTS = (HOST, "localhost")
"""Names under which a browser may open the page; any other that someone points at this machine is refused."""


def serve(folder: Path, port: int = PORT, device: str = "cpu", base: str | None = None) -> None:
    """Serves the page until it is interrupted.

    Args:
        folder: the folder of all runs.
        port: port on :data:`HOST`; 0 for any that is free.
        device: device of the model of the prompt box.
        base: name or path of the base model, if it has moved since the runs.

    Raises:
        UserError: streamlit is not installed, or the port cannot be used.
    """
    require_streamlit()
    port = free_port(port)
    from streamlit.web import cli

    compat.set_own_addresses(HOST)
    log.info("%s is at http://%s:%d (only on this machine); Ctrl-C ends it.", folder, HOST, port)
    cli.main(command_line(folder, port, device, base), standalone_mode=False)


def command_line(folder: Path, port: int, device: str = "cpu", base: str | None = None) -> Sequence[str]:
    """The arguments of streamlit's own command."""
    page = Path(__file__).with_name("page.py")
    options = [f"--{name}={value}" for name, value in {**OPTIONS, "server.port": str(port)}.items()]
    options += [f"--server.allowedHosts={host}" for host in HOSTS]
    return ["run", str(page), *options, "--", str(folder.resolve()), device, *([base] if base else [])]


def require_streamlit() -> None:
    """Makes sure that streamlit is installed.

    Raises:
        UserError: It is not.
    """
    if find_spec("streamlit") is None:
        raise UserError("The page needs the package streamlit: pip install 'editlab[view]'.")


def free_port(port: int) -> int:
    """The port, if it is free, or any free one for 0.

    Raises:
        UserError: It is out of range, is in use, or may not be used.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}: give a number from 0 (any free port) to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended does not block
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"Port {port} cannot be used ({error.strerror}): give another --port, or 0.") from error
        return int(probe.getsockname()[1])
