"""Short streams of edits on a loaded model, whose weights are put back afterwards."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from stableedit_pl.data.record_encoding import EncodedRecord
from stableedit_pl.data.stream import OWN_ROWS
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.method.guard import Guard
from stableedit_pl.method.planning import BadTurn
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import LNStatistics
from stableedit_pl.model.asking import Scorer, ScoringRule
from stableedit_pl.model.capture import Captured, Pass, capture
from stableedit_pl.model.closed_form import ClosedFormEdit, EditorState, StepInput
from stableedit_pl.model.lower_outputs import LowerOutputs
from stableedit_pl.model.micro_batches import Batching
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.scoring import KINDS, EditScores, RecordAnswers, answer_records, score_records
from stableedit_pl.model.sites import Site, resolve_sites
from stableedit_pl.tune.candidates import WINDOWS, Candidate

LOWER_MEGABYTES = 1024.0
"""Bound on the outputs of layers below the sites that are kept, for all site sets together."""

Protect = Callable[[list[Site], PartialForward], dict[str, Guard]]

KEPT = 0.03
"""Share of the loss that the gradients promise which a stream's first pass must gain."""


@dataclass
class Stream:
    """How far a candidate's stream got.

    Attributes:
        candidate: its settings.
        state: of the editor.
        weights: of its sites, with their masters; empty before the first turn.
        turns: applied and scored.
        seconds: spent on it.
        scores: kind to mean over the edits applied so far; empty before any were.
        failed: why it ended; None while it goes on.
    """

    candidate: Candidate
    state: EditorState
    weights: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    turns: int = 0
    seconds: float = 0.0
    scores: dict[str, float] = field(default_factory=dict)
    failed: str | None = None


@dataclass
class _SiteSet:
    """Sites, and what all streams on them share, since it is of the base model: one capture serves every setting."""

    sites: list[Site]
    forward: PartialForward
    lower: LowerOutputs
    statistics: LNStatistics
    first: Captured | None = None
    fed: int = 0
    passes: dict[int, list[Pass]] = field(default_factory=dict)
    guards: dict[str, Guard] = field(default_factory=dict)


class Bench:
    """Runs candidates on the same rows.

    The statistics are fed from the first of these rows before the first turn, as in a run with a warm-up.

    Args:
        editor: its model is loaded and where it is to run.
        rows: encoded; the first turns of every stream.
        turn_size: edits of a turn.
        batching: makes a turn's micro-batches.
        rule: of the scores.
        protect: finds what updates of sites leave alone; None where they leave nothing.
    """

    def __init__(
        self,
        editor: LifelongEditor,
        rows: Sequence[EncodedRecord],
        turn_size: int,
        batching: Batching,
        rule: ScoringRule,
        protect: Protect | None = None,
    ) -> None:
        """See the class."""
        self.protect = protect
        self.editor, self.rule = editor, rule
        self.turns = [list(rows[start : start + turn_size]) for start in range(0, len(rows), turn_size)]
        self.batching = batching
        self._sets: dict[tuple[str, ...], _SiteSet] = {}
        self._base: list[list[RecordAnswers]] = []

    def begin(self, candidate: Candidate) -> Stream:
        """A stream before its first turn."""
        found = self._site_set(candidate.sites)
        return Stream(candidate, EditorState(found.statistics, guards=found.guards))

    def advance(self, stream: Stream, turns: int) -> None:
        """Apply turns up to ``turns`` in all, and score all edits applied so far; the model is as before afterwards."""
        started = time.perf_counter()
        found = self._site_set(stream.candidate.sites)
        while len(self._base) < turns:  # the unedited model's answers do not depend on the sites
            self._base.append(self._answers(found, self.turns[len(self._base)]))
        method = {name: value for name, value in stream.candidate.settings().items() if name != "sites"}
        settings = replace(self.editor.settings, **method)
        with self._weights_of(stream, found.sites):
            try:
                for at in range(stream.turns, turns):
                    self._apply(found, stream, settings, at)
                stream.scores, stream.turns = self._scores(found, turns), turns
            except BadTurn as error:
                stream.failed = str(error)
        stream.seconds += time.perf_counter() - started

    def _apply(self, found: _SiteSet, stream: Stream, settings: MethodSettings, at: int) -> None:
        """One more turn, the one at ``at``.

        Raises:
            BadTurn: if its numbers are bad, or the first pass of the stream made things worse: no later one helps.
        """
        captured: list[Captured] = []

        def closure() -> Tensor:
            assert found.first is not None
            captured.append(self._capture(at, found) if at else found.first)
            return captured[0].measured[0].mean()

        def given() -> StepInput:
            return StepInput(captured[0], settings, True, again, count_rows=at >= found.fed)

        def again() -> Captured:
            return self._capture(at, found)

        optimizer = ClosedFormEdit(found.sites, stream.state, given)
        optimizer.step(closure)
        assert optimizer.last is not None
        losses = [done.loss for done in optimizer.last.passes]
        promised = optimizer.last.plan.expected_gain / len(self.turns[at])
        if at == 0 and len(losses) > 1 and losses[0] - losses[1] < KEPT * promised:
            raise BadTurn(
                f"the first pass overshoots: it takes the loss from {losses[0]:.3g} to {losses[1]:.3g}, where its "
                f"gradients promise {losses[0] - promised:.3g}"
            )

    def _capture(self, turn: int, found: _SiteSet) -> Captured:
        """The turn's edits; the layers below the sites, which no edit changes, are run once for all streams."""
        encodings = [record.efficacy for record in self.turns[turn]]
        batches = self.batching([len(encoding.input_ids) for encoding in encodings])
        reduction = self.editor.loss_reduction
        known = found.passes.get(turn)
        captured = capture(found.forward, found.sites, encodings, batches, self.editor.pad_id, reduction, known)
        found.passes[turn] = captured.passes
        return captured

    def _site_set(self, patterns: tuple[str, ...]) -> _SiteSet:
        if patterns not in self._sets:
            sites = resolve_sites(self.editor.model, patterns)
            forward = PartialForward.tried(self.editor.model, sites)
            statistics = LNStatistics.empty(
                sites, self.editor.statistics_scope, {site.name: site.weight.device for site in sites}
            )
            found = _SiteSet(sites, forward, LowerOutputs(LOWER_MEGABYTES / (WINDOWS + 1)), statistics)
            rows, enough = 0, OWN_ROWS * self.editor.hidden_size()
            while rows < enough and found.fed < len(self.turns):
                captured = self._capture(found.fed, found)
                found.statistics = found.statistics.updated(captured.rows)
                found.first = found.first or captured
                found.fed += 1
                rows += len(captured.rows[sites[0].name].keys)
            if self.protect is not None:
                found.guards = self.protect(sites, forward)
            self._sets[patterns] = found
        return self._sets[patterns]

    def _answers(self, found: _SiteSet, turn: list[EncodedRecord]) -> list[RecordAnswers]:
        scorer = Scorer(found.forward, self.rule, self.editor.scoring_batch_size, self.editor.pad_id)
        return answer_records(scorer, turn, found.lower)

    def _scores(self, found: _SiteSet, turns: int) -> dict[str, float]:
        scores = EditScores()
        for turn, base in zip(self.turns[:turns], self._base, strict=False):
            reference = base if self.editor.specificity_reference == "base_output" else None
            scores.update(score_records(turn, self._answers(found, turn), self.rule, reference))
        computed = scores.compute()
        return {kind: value for kind in KINDS if (value := computed[kind]) is not None}

    @contextmanager
    def _weights_of(self, stream: Stream, sites: list[Site]) -> Iterator[None]:
        """The stream's weights in the model, and taken out again."""
        with torch.no_grad():
            for site, (weight, master) in zip(sites, stream.weights, strict=False):
                site.weight.copy_(weight)
                site.master = None if master is None else master.to(site.weight.device)
        if not stream.weights and self.editor.master_dtype == "float32":
            for site in sites:
                site.use_master(site.weight.device)
        try:
            yield
            stream.weights = [
                (site.weight.to("cpu", copy=True), None if site.master is None else site.master.to("cpu", copy=True))
                for site in sites
            ]
        finally:
            with torch.no_grad():
                for site in sites:
                    site.weight.copy_(site.original)
                    site.master = None
