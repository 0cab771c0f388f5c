"""What stands between a prompt and its continuation: a space, or nothing.

Most scripts write a space between two words. Chinese, Japanese, Thai, Lao, Khmer and Burmese do not, so a model of
these languages hardly ever sees a space there. A prompt that ends in white space, as a rendered chat prompt does, needs
nothing either: the model continues right after it.
"""

from __future__ import annotations

from bisect import bisect_right

AUTO = "auto"
"""The joint that suits the text around it (:func:`space_between`)."""
JOINTS = (AUTO, "space", "none")
"""Settings of the joint. With each of them nothing is put after a prompt that ends in white space."""

_IDEOGRAPHIC = (
    (0x2E80, 0x2FFF),  # radicals of Chinese characters
    (0x3001, 0x312F),  # punctuation, hiragana, katakana, bopomofo
    (0x3190, 0x31FF),  # annotations, strokes, extended bopomofo and katakana
    (0x3220, 0x325F),  # characters in parentheses and circles
    (0x3280, 0x4DBF),  # the same, units, extension A
    (0x4E00, 0x9FFF),  # unified ideographs
    (0xF900, 0xFAFF),  # compatibility ideographs
    (0xFE30, 0xFE4F),  # vertical forms
    (0xFF01, 0xFF9F),  # full-width forms and half-width katakana
    (0x1AFF0, 0x1B16F),  # further kana
    (0x20000, 0x3FFFF),  # extensions B and later
)
_SOUTHEAST_ASIAN = (
    (0x0E01, 0x0E7F),  # Thai
    (0x0E80, 0x0EFF),  # Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x19E0, 0x19FF),  # Khmer symbols
    (0xA9E0, 0xA9FF),  # Burmese, extended
    (0xAA60, 0xAA7F),  # Burmese, extended
)


def join(prompt: str, continuation: str, joint: str = AUTO) -> str:
    """Return the prompt and its continuation as one text.

    White space at the end of the prompt is kept, and nothing is added after it; white space around the continuation is
    removed. A prompt of nothing but white space is taken for empty.

    Args:
        prompt: the text before.
        continuation: the text that follows.
        joint: what stands between them if the prompt does not end in white space: a ``space``, ``none``, or ``auto``.
    """
    continuation = continuation.strip()
    prompt = prompt if prompt.strip() else ""
    return prompt + (" " if space_between(prompt, continuation, joint) else "") + continuation


def boundary(prompt: str) -> int:
    """Return the index of the character from which on a joined text belongs to the continuation.

    A space before a word belongs to the word, because most tokenizers have one token for both. So one space at the end
    of the prompt is counted to the continuation; other white space, such as a line break, is the prompt's own.
    """
    return len(prompt) - prompt.endswith(" ") if prompt.strip() else 0


def space_between(prompt: str, continuation: str, joint: str = AUTO) -> bool:
    """Return whether :func:`join` puts a space between a prompt and its continuation.

    ``auto`` puts none if the prompt ends in a Chinese or Japanese character, or if the prompt's last letter and the
    continuation's first character are both of scripts that write no space between words. Korean writes spaces.
    """
    if prompt[-1:].isspace() or joint == "none":
        return False
    if joint == "space" or not prompt:
        return True
    if _within(prompt[-1], _IDEOGRAPHIC):
        return False
    last_letter = next((c for c in reversed(prompt) if c.isalpha() or unspaced(c)), "")
    return not (unspaced(last_letter) and unspaced(continuation[:1]))


def unspaced(character: str) -> bool:
    """Return whether a character is of a script that writes no space between words."""
    return _within(character, _IDEOGRAPHIC) or _within(character, _SOUTHEAST_ASIAN)


def _within(character: str, ranges: tuple[tuple[int, int], ...]) -> bool:
    if not character:
        return False
    at = bisect_right(ranges, (ord(character), 0x110000)) - 1
    return at >= 0 and ord(character) <= ranges[at][1]
