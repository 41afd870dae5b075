"""UTF-8 characters that a token limit cut."""

import codecs
import re
from collections.abc import Sequence

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def begun(data: bytes) -> int:
    """How many bytes at the end of `data` begin a character that is not whole, 0 to 3."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return len(decoder.getstate()[0])


def begun_tokens(pieces: Sequence[str]) -> int:
    """How many byte tokens ("<0xF0>") at the end of `pieces` begin a character that is not whole."""
    data = b""
    for piece in reversed(pieces):
        if not (match := _BYTE.fullmatch(piece)):
            break
        data = bytes([int(match[1], 16)]) + data
    return begun(data)


def _letters() -> dict[str, int]:
    """The letter of each byte in a byte-level vocabulary (GPT-2's): printable bytes stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _letters()


def ends_begun(pieces: Sequence[str]) -> bool:
    """Whether the pieces of a byte-level vocabulary end within a character."""
    data = b""
    for piece in reversed(pieces):
        if len(data) >= 4:
            break
        known = all(letter in _LETTERS for letter in piece)
        data = (bytes(_LETTERS[letter] for letter in piece) if known else piece.encode()) + data
    return begun(data) > 0
