"""Builds the CounterFact file of our experiments from the original one, byte for byte.

    python scripts/make_counterfact.py ORIGINAL [--out counterfact.json]

ORIGINAL is ``counterfact.json`` of Meng et al. 2022 (21,919 records). Ours has 11,919 of them, each with one of its two
paraphrases and one of its neighbors, as in the redistribution that EasyEdit uses. To these come the chosen neighbors of
all records with the same prompt and the same true target that are about other subjects, in random order, up to ten in
all. ``counterfact_choice.txt`` says which records, paraphrases and neighbors: a check sum of each, so that the file
holds no text of the original.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import struct
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from editlab.errors import EditLabError, UserError
from editlab.utils.files import atomic_file

CHOICE = Path(__file__).with_name("counterfact_choice.txt")
NEIGHBORS = 10
SHA256 = "49595974d5179da8682a2cbc9305b8c2dbb78c95a3e8d90f9d107897d30fbc95"
"""Check sum of the file that our experiments read."""

Record = dict[str, Any]


def check_sum(text: str) -> int:
    """The first two bytes of a text's SHA-256, as a number."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big")


def write_choice(records: Iterable[Record], path: Path = CHOICE) -> None:
    """Write which records, paraphrases and first neighbors a file has: six bytes for each record, in base 85."""
    packed = b"".join(
        struct.pack(
            ">HHH", one["case_id"], check_sum(one["paraphrase_prompts"][0]), check_sum(one["neighborhood_prompts"][0])
        )
        for one in records
    )
    text = base64.b85encode(packed).decode()
    path.write_text("".join(text[i : i + 120] + "\n" for i in range(0, len(text), 120)), encoding="ascii")


def read_choice(path: Path = CHOICE) -> list[tuple[int, int, int]]:
    """Read what :func:`write_choice` wrote: of each record its number, and check sums of paraphrase and neighbor."""
    return list(struct.iter_unpack(">HHH", base64.b85decode("".join(path.read_text(encoding="ascii").split()))))


def rebuild(original: Sequence[Record], choice: Sequence[tuple[int, int, int]]) -> list[Record]:
    """Return our records.

    Raises:
        UserError: The original lacks a record, or a record lacks the paraphrase or the neighbor that was chosen.
    """
    by_number = {one["case_id"]: one for one in original}
    records = []
    for number, paraphrase, neighbor in choice:
        if number not in by_number:
            raise UserError(f"The original has no record {number}: give counterfact.json with all 21,919 records.")
        found = by_number[number]
        rewrite = found["requested_rewrite"]
        records.append({
            "case_id": number,
            "requested_rewrite": {
                "prompt": rewrite["prompt"],
                "subject": rewrite["subject"],
                "target_new": {"str": rewrite["target_new"]["str"]},
                "target_true": {"str": rewrite["target_true"]["str"]},
            },
            "paraphrase_prompts": [_chosen(found, "paraphrase_prompts", paraphrase)],
            "neighborhood_prompts": [_chosen(found, "neighborhood_prompts", neighbor)],
        })  # fmt: skip
    _share_neighbors(records)
    return records


def _chosen(record: Record, field: str, wanted: int) -> str:
    for prompt in record[field]:
        if check_sum(prompt) == wanted:
            return str(prompt)
    raise UserError(
        f"Record {record['case_id']} of the original has other {field} than the one that ours was made from: give the "
        "counterfact.json of ROME's authors."
    )


def _share_neighbors(records: Sequence[Record]) -> None:
    """Give each record, after its own neighbor, those of records with the same prompt and true target, not about it."""
    pools = defaultdict(set)
    for one in records:
        pools[_relation(one)].add(one["neighborhood_prompts"][0])
    draw = random.Random(0)
    own = [one["neighborhood_prompts"][0] for one in records]
    for one, first in zip(records, own, strict=True):
        subject = one["requested_rewrite"]["subject"]
        others = sorted(prompt for prompt in pools[_relation(one)] - {first} if subject not in prompt)
        draw.shuffle(others)
        one["neighborhood_prompts"] = [first, *others[: NEIGHBORS - 1]]


def _relation(record: Record) -> tuple[str, str]:
    rewrite = record["requested_rewrite"]
    return rewrite["prompt"], rewrite["target_true"]["str"]


def as_text(records: Sequence[Record]) -> str:
    """The records as the text of a file."""
    return json.dumps(records, indent=0, ensure_ascii=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds the file, and says whether it is ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="counterfact.json of ROME's authors")
    parser.add_argument("--out", type=Path, default=Path("counterfact.json"))
    given = parser.parse_args(arguments)
    try:
        if given.out.exists():
            raise UserError(f"{given.out} exists: remove it, or give another name as --out.")
        try:
            original = json.loads(given.original.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{given.original} cannot be read as JSON ({error}): check the path.") from error
        try:
            text = as_text(rebuild(original, read_choice()))
        except (KeyError, TypeError) as error:
            raise UserError(f"{given.original} is not in CounterFact's schema ({error}): check the path.") from error
        if hashlib.sha256(text.encode()).hexdigest() != SHA256:
            raise UserError("The records are not those of our experiments; nothing was written.")
        with atomic_file(given.out) as file:
            file.write_text(text, encoding="utf-8")
    except EditLabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: the {text.count('case_id')} records of our experiments")
    return 0


if __name__ == "__main__":
    sys.exit(main())
