"""Scores of the run: base, at-edit and retained, each named for what it is."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from stableedit_pl.data.record_encoding import EncodedRecord
from stableedit_pl.data.stream import EditStream
from stableedit_pl.devices import ranks
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError, require_choice
from stableedit_pl.method.scales import plain_scales
from stableedit_pl.model.asking import ScoringPrecision, ScoringRule
from stableedit_pl.model.encoding import chunks
from stableedit_pl.model.lower_outputs import LowerOutputs
from stableedit_pl.model.scoring import KINDS, EditScores, RecordAnswers
from stableedit_pl.run.curves import log_curves
from stableedit_pl.run.results import write_results


class EditEvaluation(Callback):
    """Evaluates the run and writes ``results.json``.

    * *base*: the same prompts with the original weights, before the first edit (on a resumed run they are put back
      for the measurement; the model is deterministic, so that is the same thing);
    * *at-edit*: each turn's edits right after it;
    * *retained*: edits of past turns with the weights as they are now: every ``every_n_turns`` turns on a fixed
      sample of the stream, and at the end on all applied edits.

    Several ranks divide the edits to score. Warm-up edits are never scored. Memory is bounded by ``sample_size``, not
    by the stream.

    Args:
        every_n_turns: retained scores after every so many turns; null for only at the end.
        sample_size: edits of the fixed sample.
        seed: draws the sample.
        final: score all applied edits at the end; false ends with the sample's scores.
        also_score: further scoring rules for the final scores, listed beside the editor's own.
        reuse_megabytes: bound on the memory (CPU) in which outputs of the layers below the first site are kept. No edit
            changes them: a retained score then costs the layers above only. 0 runs all layers every time.
        precision: ``bfloat16`` or ``float16``: base and retained scores are taken with matrix products of that dtype;
            null takes them in the trainer's precision. A resumed run may change it.
    """

    def __init__(
        self,
        every_n_turns: int | None = 10,
        sample_size: int = 200,
        seed: int = 0,
        final: bool = True,
        also_score: list[ScoringRule] | None = None,
        reuse_megabytes: float = 1024.0,
        precision: ScoringPrecision | None = None,
    ) -> None:
        """See the class.

        Raises:
            SettingError: if an interval or size is not positive.
        """
        if every_n_turns is not None and every_n_turns < 1:
            raise SettingError(f"EditEvaluation.every_n_turns must be at least 1 or null, got {every_n_turns}")
        if sample_size < 1:
            raise SettingError(f"EditEvaluation.sample_size must be at least 1, got {sample_size}")
        if reuse_megabytes < 0:
            raise SettingError(f"EditEvaluation.reuse_megabytes must be zero or positive, got {reuse_megabytes}")
        if precision is not None:
            require_choice("EditEvaluation.precision", precision, ScoringPrecision)
        self.precision: ScoringPrecision | None = precision
        self.reuse_megabytes = reuse_megabytes
        self._lower = LowerOutputs(reuse_megabytes)
        self.every_n_turns = every_n_turns
        self.sample_size = sample_size
        self.seed = seed
        self.final = final
        self.also_score: list[ScoringRule] = also_score or []
        self._sampled: list[int] = []
        self._sample: list[tuple[int, EncodedRecord, RecordAnswers]] = []
        self._state: dict[str, Any] = {
            "at_edit_sum": 0.0,
            "at_edit_count": 0,
            "known_before": 0,
            "last_scored": -1,
            "edit_seconds": 0.0,
            "evaluate_seconds": 0.0,
            "passes": 0,
            "editing_turns": 0,
        }

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Running sums, plain numbers only."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's sums."""
        self._state.update(state_dict)

    # ---- during the run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the base model's answers to the sample; log its scores when the run is new."""
        editor, stream = _parts(trainer, pl_module)
        started = time.perf_counter()
        self._sampled = stream.sample(self.sample_size, self.seed)
        rows = ranks.own_part(self._sampled)
        records = stream.scored(rows)
        with editor.scored_in(self.precision), editor.base_weights():
            base = editor.answer(records, lower=self._lower)
        self._sample = list(zip(rows, records, base, strict=True))
        if trainer.global_step == 0:
            with editor.scored_in(self.precision), editor.base_weights():
                scores = _mean_scores(editor, records, base, self._lower)
            log_curves(trainer, "editing", {f"base_{kind}": value for kind, value in scores.items()})
        self._state["evaluate_seconds"] += time.perf_counter() - started
        if self._due(trainer.global_step) and self._state["last_scored"] < trainer.global_step:
            self._score_sample(trainer, editor, stream)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the turn's own scores; score the sample when it is due."""
        editor, stream = _parts(trainer, pl_module)
        report = editor.report
        assert report is not None
        self._state["edit_seconds"] += report.edit_seconds
        self._state["evaluate_seconds"] += report.seconds["score"]
        if report.turn.phase == "edit" and report.at_edit is not None:
            self._state["passes"] += len(report.step.passes)
            self._state["editing_turns"] += 1
            self._state["at_edit_sum"] += sum(report.at_edit)
            self._state["at_edit_count"] += len(report.at_edit)
            self._state["known_before"] += sum(report.known_before)
            log_curves(trainer, "editing", {"at_edit_efficacy": report.at_edit_efficacy})
            editor.log("at_edit_efficacy", report.at_edit_efficacy or 0.0, logger=False, batch_size=1)
        if self._due(trainer.global_step):
            self._score_sample(trainer, editor, stream)

    def _due(self, turn: int) -> bool:
        return self.every_n_turns is not None and turn > 0 and turn % self.every_n_turns == 0

    def _score_sample(self, trainer: Trainer, editor: LifelongEditor, stream: EditStream) -> None:
        started = time.perf_counter()
        applied = stream.applied_rows(trainer.global_step, editor.state.rejected_turns)
        past = [(record, base) for row, record, base in self._sample if row in applied]
        if any(row in applied for row in self._sampled):
            records, base = [record for record, _ in past], [base for _, base in past]
            with editor.scored_in(self.precision):
                scores = _mean_scores(editor, records, base, self._lower)
            log_curves(trainer, "editing", {f"retained_{kind}": value for kind, value in scores.items()})
            for kind, value in scores.items():
                if value is not None:
                    editor.log(f"retained_{kind}", value, logger=False, batch_size=1)
        self._state["last_scored"] = trainer.global_step
        self._state["evaluate_seconds"] += time.perf_counter() - started

    # ---- at the end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score all applied edits, with the base weights and with the edited ones, and write the results."""
        editor, stream = _parts(trainer, pl_module)
        started = time.perf_counter()
        applied = stream.applied_rows(trainer.global_step, editor.state.rejected_turns)
        rows = list(applied) if self.final else [row for row in self._sampled if row in applied]
        rules: list[ScoringRule] = [editor.scoring, *(rule for rule in self.also_score if rule != editor.scoring)]
        rank_zero_info(f"Scoring {len(rows)} applied edits with the original and with the final weights ...")
        with editor.scored_in(self.precision):
            by_rule = {
                rule: score_base_and_retained(editor, stream, rows, rule, self.reuse_megabytes) for rule in rules
            }
        self._state["evaluate_seconds"] += time.perf_counter() - started
        base, retained = by_rule[editor.scoring]
        count = self._state["at_edit_count"]
        at_edit = self._state["at_edit_sum"] / count if count else None
        write_results(
            trainer,
            editor,
            stream,
            {
                "edits": len(applied),
                "turns": trainer.global_step,
                "warmup_turns": stream.schedule.warmup_turns_before(trainer.global_step),
                "rejected": {
                    "turns": len(editor.state.rejected_turns),
                    "edits": stream.schedule.target_edits_before(trainer.global_step) - len(applied),
                },
                "known_before": self._state["known_before"],
                "passes": self._state["passes"] / max(self._state["editing_turns"], 1),
                "scales": plain_scales(editor.state.scales),
                "base": base,
                "at_edit": {"efficacy": at_edit},
                "retained": retained,
                "other_rules": {
                    rule: {"base": scores[0], "retained": scores[1]}
                    for rule, scores in by_rule.items()
                    if rule != editor.scoring
                },
                "seconds": {"edit": self._state["edit_seconds"], "evaluate": self._state["evaluate_seconds"]},
            },
            measured={
                "passes": "mean over editing turns of how often a turn looked at its edits",
                "scales": "absolute settings that relative ones became; empty where there were none, or too few rows",
                "base": "the same prompts as retained, with the original weights; by base_output, its specificity is "
                "agreement with itself",
                "at_edit": "each edit right after its own turn, mean over all target edits",
                "retained": f"final weights, on {'all' if self.final else 'a fixed sample of'} {len(rows)} applied "
                "target edits",
                "precision": self.precision or f"the trainer's, {trainer.precision}",
            },
            forked_from=editor.forked_from,
        )


def score_base_and_retained(
    editor: LifelongEditor, stream: EditStream, rows: list[int], rule: ScoringRule, reuse_megabytes: float
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Mean scores of target edits with the original and with the current weights, in pieces of bounded size."""
    if not rows:
        return dict.fromkeys(KINDS), dict.fromkeys(KINDS)
    base_scores, retained_scores = EditScores(), EditScores()
    for piece in chunks(rows, stream.evaluation_batch_size):
        records = stream.scored(ranks.own_part(piece))
        lower = LowerOutputs(reuse_megabytes)
        with editor.base_weights():
            base = editor.answer(records, rule, lower)
            base_scores.update(editor.compare(records, base, base, rule))
        retained_scores.update(editor.compare(records, editor.answer(records, rule, lower), base, rule))
    return base_scores.compute(), retained_scores.compute()


def _mean_scores(
    editor: LifelongEditor, records: list[EncodedRecord], base: list[RecordAnswers], lower: LowerOutputs
) -> dict[str, float | None]:
    scores = EditScores()
    scores.update(editor.compare(records, editor.answer(records, lower=lower), base))
    return {kind: scores.compute()[kind] for kind in KINDS}


def _parts(trainer: Trainer, pl_module: LightningModule) -> tuple[LifelongEditor, EditStream]:
    stream = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(pl_module, LifelongEditor) or not isinstance(stream, EditStream):
        raise TypeError("EditEvaluation needs a LifelongEditor and an EditStream")
    return pl_module, stream
