"""Tokens as text while they come: a piece is given out when all of its characters are complete."""

from collections.abc import Callable, Sequence

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer decodes the first bytes of a character to
LONGEST = 8  # tokens that are held back: more than the bytes of a character, so the bytes are no text


class TextPieces:
    """Decodes token by token; the pieces together are the text of all tokens, but for a character that stays incomplete at the end."""

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        """`decode` gives the text of tokens, see `TextTokenizer.decode`."""
        self._decode = decode
        self._told: list[int] = []  # tokens of the last piece: some tokenizers drop a space that begins a text
        self._held: list[int] = []

    def add(self, token: int) -> str:
        """The text that is complete with this token; may be empty."""
        self._held.append(token)
        before = self._decode(self._told)
        text = self._decode([*self._told, *self._held])[len(before) :]
        if text.endswith(INCOMPLETE) and len(self._held) < LONGEST:
            return ""
        self._told, self._held = self._held, []
        return text
