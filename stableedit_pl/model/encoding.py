"""Text to token ids: what the model reads, and which positions predict the target.

Vocabulary used by every other file:

* an *encoding* is one prompt with its target: ``input_ids`` (prompt, then the target without its last
  token) and ``labels`` of the same length, ``IGNORED`` except at the *answer tokens*, the positions
  whose next token is a token of the target;
* a *batch* is several encodings, padded on the right.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor

from stableedit_pl.model.lost_text import LostText

IGNORED = -100
"""Label of a position that predicts no target token (the value PyTorch's cross entropy ignores)."""

_ONE_AT_A_TIME = threading.Lock()
"""Tokenizers are not made for several threads: the next turn is encoded in one of its own while this one is scored."""

T = TypeVar("T")


class EncodingError(ValueError):
    """A prompt or target that this tokenizer and model cannot take; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of one prompt and its target.

    Attributes:
        input_ids: prompt tokens, then all target tokens but the last.
        labels: same length; the next token where that is an answer token, else ``IGNORED``.
        prompt_length: number of leading ``input_ids`` that belong to the prompt.
        skipped: tokens of the target that are read but do not count as answer tokens.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    prompt_length: int
    skipped: tuple[int, ...] = ()

    @property
    def target_ids(self) -> list[int]:
        """The target's tokens that count as answer tokens, in order."""
        return [label for label in self.labels if label != IGNORED]


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """All prompts that score one edit.

    Attributes:
        efficacy: its prompt with its target.
        generalization: its rephrasings with its target.
        specificity: its locality prompts with their stated answers.
    """

    efficacy: Encoding
    generalization: tuple[Encoding, ...]
    specificity: tuple[Encoding, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded encodings on one device.

    Attributes:
        input_ids: int64 ``[edits, length]``.
        attention_mask: int64 ``[edits, length]``, 0 on padding.
        labels: int64 ``[edits, length]``, ``IGNORED`` away from answer tokens.
        rows: edit and position of each answer token, int64 ``[N]`` each, row by row. Selecting with them, unlike with a
            mask, needs no answer from the device.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: tuple[Tensor, Tensor]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``rows`` on a device, as an index: ``hidden[batch.on(hidden.device)]``."""
        return self.rows[0].to(device), self.rows[1].to(device)

    @property
    def answers(self) -> Tensor:
        """Boolean ``[edits, length]``: true at the answer tokens."""
        return self.labels != IGNORED


@dataclass(frozen=True)
class Encoder:
    """Turns prompts and targets into encodings for one tokenizer and model.

    Args:
        tokenizer: a Hugging Face tokenizer.
        context_length: longest input the model takes, in tokens; None when it states none.
        count_bare_space: count a token that is nothing but sentencepiece's word mark, which some tokenizers put
            before a target, as an answer token, as the published program does. Off, it is read but not scored.
        vocabulary: token ids that the model has embeddings for; None when it states no number.
    """

    tokenizer: Any
    context_length: int | None = None
    count_bare_space: bool = False
    vocabulary: int | None = None

    @property
    def pad_id(self) -> int:
        """Token id that fills padding; never attended to, so any id serves that the model has an embedding for."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None and (self.vocabulary is None or candidate < self.vocabulary):
                return int(candidate)
        return 0

    @cached_property
    def _lost(self) -> LostText:
        return LostText(self.tokenizer)

    def encode(self, prompt: str, target: str) -> Encoding:
        """Encode one prompt and target: tokens of the prompt, then those of ``" " + target``.

        Args:
            prompt: text, tokenized with the tokenizer's special tokens.
            target: text, tokenized without special tokens after one space.

        Returns:
            The encoding; at least one position is an answer token.

        Raises:
            EncodingError: if the tokenizer loses some of the prompt or the target, or has tokens there that the model
                has not, if one of them has no tokens, or if both together do not fit the context.
        """
        prompt_ids, target_ids = self._prompts([prompt])[0], self._targets([target])[0]
        counted = [self.count_bare_space or not self._is_bare_space(token) for token in target_ids]
        refusal = self._text_refusal("prompt", prompt, prompt_ids) or self._text_refusal("target", target, target_ids)
        refusal = refusal or self._refusal(prompt, target, len(prompt_ids), len(target_ids), any(counted))
        if refusal:
            raise EncodingError(refusal)
        answer_labels = [token if keep else IGNORED for token, keep in zip(target_ids, counted, strict=True)]
        return Encoding(
            input_ids=tuple(prompt_ids + target_ids[:-1]),
            labels=tuple([IGNORED] * (len(prompt_ids) - 1) + answer_labels),
            prompt_length=len(prompt_ids),
            skipped=tuple(token for token, keep in zip(target_ids, counted, strict=True) if not keep),
        )

    def text(self, text: str) -> list[int]:
        """Tokens of a text by itself, special tokens before it included."""
        return self._prompts([text])[0]

    def refusals(self, pairs: Sequence[tuple[str, str]]) -> list[str | None]:
        """Find out which prompts and targets :meth:`encode` would refuse, many at a time; keeps no tokens.

        Args:
            pairs: prompts with their targets; a text that recurs is tokenized once.

        Returns:
            For each pair the message of the error, or None where it can be encoded.
        """
        prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
        targets = list(dict.fromkeys(target for _, target in pairs))
        prompt_lengths, target_sizes = dict[str, int](), dict[str, tuple[int, bool]]()
        bad_prompts, bad_targets = dict[str, str | None](), dict[str, str | None]()
        bare: dict[int, bool] = {}
        for prompt, ids in zip(prompts, self._prompts(prompts), strict=True):
            prompt_lengths[prompt] = len(ids)
            bad_prompts[prompt] = self._text_refusal("prompt", prompt, ids)
        for target, ids in zip(targets, self._targets(targets), strict=True):
            bad_targets[target] = self._text_refusal("target", target, ids)
            scored = bool(ids) if self.count_bare_space else False
            for token in ids:
                if scored:
                    break
                if token not in bare:
                    bare[token] = self._is_bare_space(token)
                scored = not bare[token]
            target_sizes[target] = len(ids), scored
        return [
            bad_prompts[p] or bad_targets[t] or self._refusal(p, t, prompt_lengths[p], *target_sizes[t])
            for p, t in pairs
        ]

    def _text_refusal(self, kind: str, text: str, ids: Sequence[int]) -> str | None:
        """Why these tokens do not stand for a text, if so; a target's space before it is its own affair."""
        with _ONE_AT_A_TIME:
            lost = self._lost.of(text, ids)
        if lost is not None:
            return (
                f"the {kind} {text!r} does not survive this tokenizer, which has no token for {lost!r}: another text "
                "would be learned and scored"
            )
        highest = max(ids, default=0)
        if self.vocabulary is not None and highest >= self.vocabulary:
            piece = self.tokenizer.convert_ids_to_tokens(highest)
            return (
                f"the {kind} {text!r} has the token {piece!r} with id {highest}, but the model has embeddings for "
                f"ids 0..{self.vocabulary - 1} alone (its tokenizer has grown; resize_token_embeddings was not called, "
                "or config.json is another model's)"
            )
        return None

    def _refusal(self, prompt: str, target: str, prompt_length: int, target_length: int, scored: bool) -> str | None:
        """Why a prompt and a target of so many tokens cannot be encoded, if so."""
        if not prompt_length:
            return f"the prompt {prompt!r} tokenizes to nothing, so no position predicts the target"
        if not scored:
            return f"the target {target!r} tokenizes to nothing that could be scored"
        length = prompt_length + target_length - 1
        if self.context_length is not None and length > self.context_length:
            return f"prompt and target need {length} tokens, but the model's context is {self.context_length}"
        return None

    def _prompts(self, prompts: list[str]) -> list[list[int]]:
        """Tokens of prompts, with the special tokens that come before."""
        tokens = self._tokens(prompts, add_special_tokens=True)
        # Some tokenizers close every text with an end token; after the prompt it would end the sentence
        # before the answer. It is part of the special tokens, so the target starts where it stood.
        eos = self.tokenizer.eos_token_id
        if eos != self.tokenizer.bos_token_id:
            for ids in tokens:
                if len(ids) > 1 and ids[-1] == eos:
                    ids.pop()
        return tokens

    def _targets(self, targets: list[str]) -> list[list[int]]:
        """Tokens of targets, each after one space."""
        return self._tokens([" " + target for target in targets], add_special_tokens=False)

    def _tokens(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:  # which tokenizers do not take
            return []
        with _ONE_AT_A_TIME:
            return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]]

    def _is_bare_space(self, token: int) -> bool:
        """Whether a token is nothing but sentencepiece's word mark; a byte-level space is a token like others."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        return bool(piece) and not piece.strip("\u2581")


def collate(encodings: Sequence[Encoding], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pad encodings on the right to the longest of them.

    Args:
        encodings: at least one.
        pad_id: token id written on padding (masked out).
        device: where the batch goes.

    Returns:
        The batch, int64 ``[len(encodings), longest]``.
    """
    longest = max(len(encoding.input_ids) for encoding in encodings)
    input_ids, attention_mask, labels = [], [], []
    edits, positions = [], []
    for row, encoding in enumerate(encodings):
        padding = longest - len(encoding.input_ids)
        input_ids.append([*encoding.input_ids, *[pad_id] * padding])
        attention_mask.append([1] * len(encoding.input_ids) + [0] * padding)
        labels.append([*encoding.labels, *[IGNORED] * padding])
        answers = [at for at, label in enumerate(encoding.labels) if label != IGNORED]
        edits += [row] * len(answers)
        positions += answers
    move = partial(_moved, device=torch.device(device))
    return Batch(move(input_ids), move(attention_mask), move(labels), (move(edits), move(positions)))


def _moved(values: list[Any], device: torch.device) -> Tensor:
    """Integers on a device; from page-locked memory, so that nobody waits for the copy."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Consecutive pieces of at most ``size`` items; the last may be shorter, none is dropped."""
    iterator = iter(items)
    while piece := list(islice(iterator, size)):
        yield piece
