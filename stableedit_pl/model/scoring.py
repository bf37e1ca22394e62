"""Scores of edits: how well a model answers, under a rule that is named with every number.

* ``token_match``: the target is fed in (teacher forcing); fraction of answer tokens that are the model's first
  choice. The field's usual figure, and a flattering one.
* ``exact_match``: the same, 1 only if all answer tokens are.
* ``greedy_match``: the model decodes freely from the prompt; 1 only if it writes the target's tokens.

A prompt has one score; an edit's efficacy, generalization and specificity are the means over its prompts of that
kind, and a stream's are the means over the edits that have such prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from stableedit_pl.devices import ranks
from stableedit_pl.model.asking import Answer, Ids, Scorer, ScoringRule
from stableedit_pl.model.encoding import EncodedPrompts
from stableedit_pl.model.lower_outputs import LowerOutputs

KINDS = ("efficacy", "generalization", "specificity")
RULES: dict[ScoringRule, str] = {
    "token_match": "teacher forcing; fraction of the target's tokens that are the model's first choice",
    "exact_match": "teacher forcing; 1 if all of the target's tokens are the model's first choice",
    "greedy_match": "free greedy decoding from the prompt; 1 if it writes the target's tokens",
}
"""What each rule does, as results say it."""


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


@dataclass(frozen=True, slots=True)
class RecordAnswers:
    """A model's answers to all prompts of one edit."""

    efficacy: Answer
    generalization: tuple[Answer, ...]
    specificity: tuple[Answer, ...]


def answer_records(
    scorer: Scorer, records: Sequence[EncodedPrompts], lower: LowerOutputs | None = None
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
    records: Sequence[EncodedPrompts],
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
