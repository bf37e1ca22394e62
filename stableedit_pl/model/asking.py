"""Asking a model: its answers to prompts with the target fed in, or decoded freely.

How answers are judged is in ``scoring``.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from stableedit_pl.model.capture import Pass, answer_loss
from stableedit_pl.model.encoding import Batch, Encoding, chunks, collate
from stableedit_pl.model.lower_outputs import LowerOutputs
from stableedit_pl.model.micro_batches import by_length
from stableedit_pl.model.partial_forward import PartialForward

ScoringRule = Literal["token_match", "exact_match", "greedy_match"]
ScoringPrecision = Literal["bfloat16", "float16"]
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answers to one prompt, and what that cost it.

    Attributes:
        tokens: the predicted token at each answer token (or as many decoded tokens, those that do not count left out).
        loss: cross entropy summed over the target's answer tokens; NaN when decoded freely.
    """

    tokens: Ids
    loss: float = float("nan")


def autocast(precision: ScoringPrecision | None, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Matrix products of the forward passes inside in a coarser dtype; None leaves them as they are."""
    return contextlib.nullcontext() if precision is None else torch.autocast(device.type, getattr(torch, precision))


class Scorer:
    """Asks a model, in batches of similar length.

    Args:
        forward: runs the causal language model, which is in eval mode.
        rule: how answers are scored.
        batch_size: most prompts per forward pass.
        pad_id: fills padding.
    """

    def __init__(self, forward: PartialForward, rule: ScoringRule, batch_size: int, pad_id: int) -> None:
        """See the class."""
        self.forward = forward
        self.model = forward.model
        self.rule = rule
        self.batch_size = batch_size
        self.pad_id = pad_id

    def answers(self, encodings: Sequence[Encoding], lower: LowerOutputs | None = None) -> list[Answer]:
        """The model's answers, in the order of ``encodings``.

        Args:
            encodings: prompts with their targets.
            lower: takes and gives the layers' outputs that no edit changes; ``generate`` cannot use them.
        """
        with torch.no_grad():
            return self._decoded(encodings) if self.rule == "greedy_match" else self.teacher_forced(encodings, lower)

    @torch.no_grad()
    def teacher_forced(self, encodings: Sequence[Encoding], lower: LowerOutputs | None = None) -> list[Answer]:
        """Answers with the target fed in, whatever the rule; they carry the loss."""
        answers: list[Answer] = [Answer(())] * len(encodings)
        for members in by_length([len(encoding.input_ids) for encoding in encodings], size=self.batch_size):
            piece = [encodings[i] for i in members]
            batch = collate(piece, self.pad_id, self.forward.device)
            known = None if lower is None else lower.find(piece, self.forward.device)
            if lower is None or known is not None:
                logits = self.forward.logits(batch, known)
            else:
                logits, output = self.forward.logits_and_lower(batch)
                if output is not None:
                    lower.keep(piece, output)
            self._read(members, batch, logits, answers)
        return answers

    @torch.no_grad()
    def again(self, passes: Sequence[Pass]) -> list[Answer]:
        """Teacher-forced answers to a turn's edits after it; layers below the first site are not run again."""
        answers: list[Answer] = [Answer(())] * sum(len(done.members) for done in passes)
        for done in passes:
            logits = self.forward.logits(done.batch, done.lower)
            self._read(done.members, done.batch, logits, answers)
        return answers

    @staticmethod
    def _read(members: Sequence[int], batch: Batch, logits: Tensor, answers: list[Answer]) -> None:
        """Put a pass's answers in their places."""
        losses = answer_loss(logits, batch, "token_sum")[1].tolist()
        owners, predicted = batch.rows[0].tolist(), logits.argmax(dim=-1).tolist()
        tokens: list[list[int]] = [[] for _ in members]
        for owner, token in zip(owners, predicted, strict=True):
            tokens[owner].append(token)
        for i, given, loss in zip(members, tokens, losses, strict=True):
            answers[i] = Answer(tuple(given), loss)

    def _decoded(self, encodings: Sequence[Encoding]) -> list[Answer]:
        """Greedy continuations as long as each target. Prompts of one length go together: no padding at all."""
        answers: list[Answer] = [Answer(())] * len(encodings)
        by_length: dict[int, list[int]] = {}
        for i, encoding in enumerate(encodings):
            by_length.setdefault(encoding.prompt_length, []).append(i)
        for length, members in sorted(by_length.items()):
            for piece in chunks(members, self.batch_size):
                prompts = torch.tensor([encodings[i].input_ids[:length] for i in piece], device=self.forward.device)
                wanted = [len(encodings[i].target_ids) + len(encodings[i].skipped) for i in piece]
                written = greedy(self.model, prompts, max(wanted), self.pad_id).tolist()
                for i, tokens in zip(piece, written, strict=True):
                    count, skipped = len(encodings[i].target_ids), encodings[i].skipped
                    counted = [token for token in tokens if token not in skipped]
                    # After the end token generate writes padding; a short answer is a wrong one, not an error.
                    answers[i] = Answer(tuple((counted + [self.pad_id] * count)[:count]))
        return answers


@torch.no_grad()
def greedy(model: Any, prompts: Tensor, max_new_tokens: int, pad_id: int) -> Tensor:
    """Greedy continuation by the model's own ``generate``, whatever penalties the model was shipped with.

    Args:
        model: causal language model.
        prompts: int64 ``[n, length]``, no padding.
        max_new_tokens: at most so many.
        pad_id: written after the end token.

    Returns:
        The new tokens, int64 ``[n, <= max_new_tokens]``.
    """
    shipped = model.generation_config
    plain: Any = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
        bos_token_id=shipped.bos_token_id,
        eos_token_id=shipped.eos_token_id,
    )
    # generate fills what the given configuration leaves open from the model's own: it must not see that.
    model.generation_config = plain
    try:
        attended = torch.ones_like(prompts)
        # Ranks that must run together keep in step in a way of our own (``lockstep``), not in transformers'.
        out = model.generate(prompts, attention_mask=attended, generation_config=plain, synced_gpus=False)
    finally:
        model.generation_config = shipped
    return out[:, prompts.shape[1] :]  # type: ignore[no-any-return]
