"""What a run was made with: revision of the code, machine, digest of the settings."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from editlab.experiments.csv_files import UNKNOWN, VERSIONS
from editlab.utils.files import atomic_file
from editlab.utils.version import __version__

FILE = "provenance.json"

RECIPE_CONTENT = "recipe_content"
"""Entry of a run's provenance: digest of the settings in its recipe file, which may change under its name."""

JOINT = " | "
"""Separates the values of what was made in several ways."""

NONE = "none"
"""The revision of a folder that is in no git repository."""


def provenance(project: Path) -> dict[str, str]:
    """The code's revision in git ("+": files were changed since), and the machine's CPU and GPUs.

    Tables and figures do not count as changed: experiments write them.

    Args:
        project: folder of the checkout; the revision of a folder that is in no git repository is "none".
    """
    written = (":!results", ":!figs")
    changed = _output(project, "git", "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    gpus = _output(project, "nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    revision = _output(project, "git", "rev-parse", "--short", "HEAD")
    return {
        "revision": revision + ("+" if changed else "") if revision else NONE,
        "machine": ", ".join([f"{cores()} x {cpu_name()}", *gpus]),
    }


def _output(folder: Path, *command: str) -> str:
    """What a command prints; empty if there is no such command, or it fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return "" if done.returncode else done.stdout.strip()


def cores() -> int:
    """Number of cores that this process may run on, as far as the system tells; else of all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_provenance(folder: Path) -> dict[str, str]:
    """What a run was started with; empty if that was not recorded, or cannot be read."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_provenance(folder: Path, content: Mapping[str, str], resumed: bool) -> None:
    """Records what a run is started with; a resumed run keeps all that it was ever started with."""
    if resumed:
        content = with_earlier(read_provenance(folder), content)
    write_json(folder / FILE, content)


def with_earlier(earlier: Mapping[str, str], content: Mapping[str, str]) -> dict[str, str]:
    """Provenance of a resumed run: each value that it was ever started with, once."""
    before = {name: earlier.get(name, UNKNOWN).split(JOINT) for name in content}
    return {name: JOINT.join(dict.fromkeys([*before[name], value])) for name, value in content.items()}


def joined(rows: Sequence[Mapping[str, str]], names: Sequence[str]) -> dict[str, str]:
    """Provenance of a row that is made of several: each value once; names without any value are left out."""
    values = {name: [one for row in rows for one in row.get(name, "").split(JOINT) if one] for name in names}
    return {name: JOINT.join(dict.fromkeys(found)) for name, found in values.items() if found}


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Writes a small JSON file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def made_here(project: Path, settings: Mapping[str, object]) -> dict[str, str]:
    """Provenance of rows that this process measures itself, as a benchmark does: all columns that tables require.

    Args:
        project: folder of the checkout.
        settings: of the measurement; the row gets a digest of them.
    """
    text = json.dumps({name: str(value) for name, value in sorted(settings.items())})
    versions = {name: __version__ if name == "editlab" else version(name) for name in VERSIONS}
    return {"settings": hashlib.sha256(text.encode()).hexdigest()[:8], **provenance(project), **versions}
