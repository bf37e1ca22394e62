"""Scores of edits: how well a model answers, under a rule that is named with every number.

* ``token_match``: the target is fed in (teacher forcing); fraction of answer tokens that are the model's first
  choice. The field's usual figure, and a flattering one.
* ``exact_match``: the same, 1 only if all answer tokens are.
* ``greedy_match``: the model decodes freely from the prompt; 1 only if it writes the target's tokens.

A prompt has one score; an edit's efficacy, generalization and specificity are the means over its prompts of that
kind, and a stream's are the means over the edits that have such prompts.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import GenerationConfig

from stableedit_pl import ranks
from stableedit_pl.capture import Pass, answer_loss
from stableedit_pl.encoding import Batch, Encoding, chunks, collate
from stableedit_pl.lower_outputs import LowerOutputs
from stableedit_pl.micro_batches import by_length
from stableedit_pl.partial_forward import PartialForward
from stableedit_pl.record_encoding import EncodedRecord

ScoringRule = Literal["token_match", "exact_match", "greedy_match"]
ScoringPrecision = Literal["bfloat16", "float16"]
KINDS = ("efficacy", "generalization", "specificity")
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


def match(answer: Ids, expected: Ids, rule: ScoringRule) -> float:
    """Score of one answer, between 0 and 1.

    Raises:
        ValueError: if the answers have different lengths.
    """
    if len(answer) != len(expected):
        raise ValueError(f"an answer of {len(answer)} tokens compared with one of {len(expected)}")
    if rule == "token_match":
        return sum(a == b for a, b in zip(answer, expected, strict=True)) / len(expected)
    return float(answer == expected)


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


@dataclass(frozen=True, slots=True)
class RecordAnswers:
    """A model's answers to all prompts of one edit."""

    efficacy: Answer
    generalization: tuple[Answer, ...]
    specificity: tuple[Answer, ...]


def answer_records(
    scorer: Scorer, records: Sequence[EncodedRecord], lower: LowerOutputs | None = None
) -> list[RecordAnswers]:
    """Ask all prompts of all edits, batched together; ``lower`` as in :meth:`Scorer.answers`."""
    encodings = [e for r in records for e in (r.efficacy, *r.generalization, *r.specificity)]
    given = iter(scorer.answers(encodings, lower))
    return [
        RecordAnswers(
            next(given),
            tuple(next(given) for _ in record.generalization),
            tuple(next(given) for _ in record.specificity),
        )
        for record in records
    ]


def score_records(
    records: Sequence[EncodedRecord],
    answers: Sequence[RecordAnswers],
    rule: ScoringRule,
    base: Sequence[RecordAnswers] | None,
) -> list[tuple[float, float | None, float | None]]:
    """Efficacy, generalization and specificity of each edit.

    Args:
        records: the edits.
        answers: the scored model's answers to them.
        rule: how answers are compared.
        base: the unedited model's answers, which specificity is agreement with; None to compare with the
            locality prompts' stated answers.

    Returns:
        One triple per edit; None where it has no prompts of that kind.
    """
    scores = []
    for i, (record, answer) in enumerate(zip(records, answers, strict=True)):
        efficacy = match(answer.efficacy.tokens, tuple(record.efficacy.target_ids), rule)
        rephrased = [
            match(a.tokens, tuple(e.target_ids), rule)
            for a, e in zip(answer.generalization, record.generalization, strict=True)
        ]
        references = (
            [tuple(e.target_ids) for e in record.specificity]
            if base is None
            else [a.tokens for a in base[i].specificity]
        )
        local = [match(a.tokens, ref, rule) for a, ref in zip(answer.specificity, references, strict=True)]
        scores.append((efficacy, _mean(rephrased), _mean(local)))
    return scores


class EditScores(Metric):
    """Mean efficacy, generalization and specificity over edits.

    ``update`` takes triples as from :func:`score_records`; ``compute`` gives a float per kind, None for a kind
    that no edit had. Each rank takes its own edits; ``compute``, which all must call, is over those of all.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__(dist_sync_fn=ranks.gather_same)
        self.add_state("sums", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Sequence[tuple[float, float | None, float | None]]) -> None:
        """Add edits."""
        for score in scores:
            for kind, value in enumerate(score):
                if value is not None:
                    self.sums[kind] += value
                    self.counts[kind] += 1

    def compute(self) -> dict[str, float | None]:
        """Kind to its mean over edits."""
        means = (self.sums / self.counts.clamp(min=1)).tolist()
        return {
            kind: mean if count else None for kind, mean, count in zip(KINDS, means, self.counts.tolist(), strict=True)
        }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
