"""What a tokenizer has no tokens for: characters that it drops, or reads as its unknown token.

Such a text would be taught and scored as another one, and nothing would show it. What a tokenizer only writes another
way is not lost: letters made small, accents composed or taken off, spaces cleaned up, marks put before words.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from tokenizers import pre_tokenizers

_IN_UTF8 = [byte for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]
"""Bytes that a text can have."""

_SILENT = frozenset("\u2581\ufe0e\ufe0f")
"""Sentencepiece's mark of a space, and what chooses between two drawings of the character before."""


@dataclass(frozen=True)
class LostText:
    """Finds what of a text a tokenizer loses.

    Most texts are settled by their token ids and characters alone: a character that was kept once is kept always,
    unless the unknown token stands there.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    tokenizer: Any
    _kept: set[str] = field(default_factory=set, compare=False, repr=False)

    def of(self, text: str, ids: Sequence[int]) -> str | None:
        """What is lost of a text.

        Args:
            text: as it was tokenized.
            ids: its tokens, with or without special ones.

        Returns:
            The lost pieces, each once, parted by spaces; None if everything is kept.
        """
        if self._takes_all_bytes:
            return None
        if self.tokenizer.unk_token_id not in ids and self._kept.issuperset(text):
            return None
        if not self.tokenizer.is_fast:
            lost = self._by_decoding(text, ids)
        else:
            unknown = self._unknown(text)
            lost = unknown + [piece for piece in self._dropped(text) if not any(piece in word for word in unknown)]
        if lost:
            return " ".join(dict.fromkeys(lost))
        # Marks may be kept on one letter and not on another, and whole words may be looked up before their letters.
        if not (self.tokenizer.is_fast and getattr(self._core.model, "ignore_merges", False)):
            self._kept.update(letter for letter in text if not _is_mark(letter))
        return None

    @property
    def _core(self) -> Any:
        return self.tokenizer.backend_tokenizer

    def _unknown(self, text: str) -> list[str]:
        """The pieces that the unknown token stands for."""
        unknown = self.tokenizer.unk_token_id
        if unknown is None:
            return []
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        pieces = [text[start:end].strip() for token, (start, end) in spans if token == unknown]
        return [piece for piece in pieces if not all(map(_is_silent, piece)) and piece != self.tokenizer.unk_token]

    def _dropped(self, text: str) -> list[str]:
        """Characters, with the accents on them, that are in the text as the tokenizer cuts it and in no token.

        Offsets do not tell: a piece that lost a character has those of a shorter one.
        """
        for added in self.tokenizer.get_added_vocab():
            text = text.replace(added, " ")
        written = self._normalized(text)
        pieces = [written]
        if self._core.pre_tokenizer is not None:
            pieces = [piece for piece, _ in self._core.pre_tokenizer.pre_tokenize_str(written)]
        taken = "".join(token.value for piece in pieces for token in self._core.model.tokenize(piece))

        def kept(letter: str) -> bool:
            if _is_silent(letter):
                return True
            if self._is_byte_level:
                return all(_letters_of_bytes()[byte] in taken for byte in letter.encode())
            return letter in taken or all(_byte_token(byte) in taken for byte in letter.encode())

        clusters: list[str] = []
        for letter in written:
            if clusters and _is_mark(letter):
                clusters[-1] += letter
            else:
                clusters.append(letter)
        gone = [cluster for cluster in clusters if not all(map(kept, cluster))]
        return [unicodedata.normalize("NFC", cluster) for cluster in gone]

    def _by_decoding(self, text: str, ids: Sequence[int]) -> list[str]:
        """Letters and digits that are not in the tokens' text; signs too, where the unknown token stands there.

        Tokenizers without offsets tell no more.
        """
        plain = _plain(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
        unknown = self.tokenizer.unk_token_id in ids
        signs = ("P", "S") if unknown else ()
        asked = [letter for letter in text if letter.isalnum() or unicodedata.category(letter).startswith(signs)]
        return [letter for letter in asked if _plain(letter) not in plain]

    def _normalized(self, text: str) -> str:
        normalizer = self._core.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    @cached_property
    def _is_byte_level(self) -> bool:
        """Whether words are cut into bytes, each written as a letter; found out by looking."""
        specimen = "\u0436\u4e16"  # letters that no normalizer composes or decomposes
        cut = self._normalized(specimen)
        if self._core.pre_tokenizer is not None:
            cut = "".join(piece for piece, _ in self._core.pre_tokenizer.pre_tokenize_str(cut))
        return "".join(_letters_of_bytes()[byte] for byte in specimen.encode()) in cut

    @cached_property
    def _takes_all_bytes(self) -> bool:
        """Whether there is a token for every byte, so that no text is lost, whatever it is."""
        if not self.tokenizer.is_fast:
            return False
        if getattr(self._core.model, "byte_fallback", False):
            tokens = [_byte_token(byte) for byte in _IN_UTF8]
        elif self._is_byte_level:
            tokens = [_letters_of_bytes()[byte] for byte in _IN_UTF8]
        else:
            return False
        return all(self._core.token_to_id(token) is not None for token in tokens)


def _plain(text: str) -> str:
    """A text without what tokenizers write another way: case, composition, widths, accents."""
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    bare = "".join(letter for letter in decomposed if not _is_mark(letter))
    return bare or decomposed


def _is_mark(letter: str) -> bool:
    return unicodedata.category(letter).startswith("M")


def _is_silent(letter: str) -> bool:
    """Whether a character says nothing: a space, a control, a width of nothing."""
    return letter.isspace() or letter in _SILENT or unicodedata.category(letter) in ("Cc", "Cf")


def _byte_token(byte: int) -> str:
    """How tokenizers that fall back to bytes write one."""
    return f"<0x{byte:02X}>"


@cache
def _letters_of_bytes() -> dict[int, str]:
    """The letter that byte-level tokenizers write for each byte: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return letters
