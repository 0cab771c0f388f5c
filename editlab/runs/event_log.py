"""Events of a run as JSON lines, one object a line, which a killed and resumed run continues without gap or repeat."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from editlab.errors import UserError
from editlab.utils.files import atomic_file


class EventLog:
    """A file of events in a run's folder; each has the ``step`` (the batch's number) that it belongs to.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: Mapping[str, Any]) -> None:
        """Writes an event as a line.

        Raises:
            UserError: where the file can not be written.
        """
        line = json.dumps(event, ensure_ascii=False, allow_nan=False)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise UserError(
                f"{self.path} can not be written ({error.strerror}): free space there, or choose another "
                "trainer.logger.init_args.save_dir; --ckpt_path last goes on from the last batch."
            ) from error

    def read(self) -> list[dict[str, Any]]:
        """All events; what a kill left half-written at the end, and what is none of ours, is passed over."""
        if not self.path.exists():
            return []
        events = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:  # half a character is no text
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and isinstance(event.get("step"), int):
                events.append(event)
        return events

    def go_on(self, step: int) -> None:
        """Drops the events of batch ``step`` and later ones, which a resumed run makes anew."""
        if not self.path.exists():
            return
        kept = [event for event in self.read() if event["step"] < step]
        with atomic_file(self.path) as temporary:
            Path(temporary).write_text(
                "".join(json.dumps(event, ensure_ascii=False) + "\n" for event in kept), encoding="utf-8"
            )
