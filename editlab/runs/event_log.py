"""Events of a run as JSON lines; a killed and resumed run continues the file without gaps or repetitions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from editlab.errors import UserError
from editlab.utils.files import atomic_file


class EventLog:
    """A file of events in a run's folder, one JSON object per line; each has a ``step``, its batch's number from 0.

    Args:
        path: path of the file, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Mapping[str, Any]) -> None:
        """Appends an event as a line.

        Raises:
            UserError: if the file cannot be written.
        """
        line = json.dumps(event, ensure_ascii=False, allow_nan=False)
        size: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = self.path.stat().st_size if self.path.exists() else 0
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if size is not None:
                with suppress(OSError):  # a part of the line may have been written
                    os.truncate(self.path, size)
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}): free space there, or choose another "
                "trainer.logger.init_args.save_dir; --ckpt_path last resumes after the last saved batch."
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """All events; a line that was only partly written before a kill, and lines of other programs, are skipped."""
        if not self.path.exists():
            return []
        events = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:  # bytes, as half a character cannot be decoded
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict) and isinstance(event.get("step"), int):
                events.append(event)
        return events

    def resume(self, step: int) -> None:
        """Resumes the log at batch ``step``: its events and later ones are dropped, as they will be written again."""
        if not self.path.exists():
            return
        kept = [event for event in self.read() if event["step"] < step]
        with atomic_file(self.path) as temporary:
            Path(temporary).write_text(
                "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept), encoding="utf-8"
            )
