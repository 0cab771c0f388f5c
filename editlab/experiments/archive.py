"""What runs have recorded, packed for the repository: settings, logs, metrics and the outcome of each fact.

An archive depends on the run alone, to the bit, so that packing a run again changes nothing. Folders of the machine are
replaced by what they are relative to: ``.`` for the project, ``~`` for the user's folder.
"""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from editlab.experiments.plan import Run
from editlab.utils.files import atomic_file

PACKED = ("config.yaml", "provenance.json", "summary.json", "metrics.csv", "outcomes.csv", "*_events.jsonl", "*.log",
          "failed.json")  # fmt: skip
"""Files of a run's folder that are packed, where they exist; checkpoints and TensorBoard's files are not."""


def archive(runs: Sequence[Run], folder: Path, places: Mapping[str, str]) -> list[Path]:
    """Packs each finished or failed run as ``CASE-SEED.tar.gz``.

    Args:
        runs: the runs.
        folder: folder of the archives.
        places: folder of this machine -> what stands for it in the texts; the longest is replaced first.

    Returns:
        The archives.
    """
    packed = []
    for run in runs:
        if run.status != "to run":
            path = folder / f"{run.case.name}-{run.seed}.tar.gz"
            with atomic_file(path) as temporary:
                temporary.write_bytes(_pack(run.folder, places))
            packed.append(path)
    return packed


def _pack(folder: Path, places: Mapping[str, str]) -> bytes:
    """The files of a run as a tar archive, compressed."""
    content = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=content, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted({path for pattern in PACKED for path in folder.glob(pattern)}):
            text = path.read_text(encoding="utf-8", errors="replace")
            for place in sorted(places, key=len, reverse=True):
                text = text.replace(place, places[place])
            member = tarfile.TarInfo(path.name)  # its time, owner and group are 0
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return content.getvalue()
