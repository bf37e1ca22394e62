"""What the verbs ``validate``, ``test`` and ``predict`` ask a model, piece by piece of a stream."""

from stableedit_pl.data.record_encoding import ScoredPiece
from stableedit_pl.model.editable_model import EditableModel
from stableedit_pl.model.scoring import EditScores, score_records


class ScoredModel(EditableModel):
    """Lightning's loops over an :class:`EditableModel`; its arguments.

    Attributes:
        edits_scored: whether the model that was scored last had edits in its weights.
    """

    edits_scored = False

    def on_validation_epoch_start(self) -> None:
        """Start the scores of ``validate``; from here on it is settled whether they are of an edited model."""
        self._scores = EditScores()
        self.edits_scored = self.is_edited()

    on_test_epoch_start = on_validation_epoch_start

    @property
    def specificity_measured_by(self) -> str:
        """What ``validate`` and ``test`` hold specificity against: without edits there is nothing to agree with."""
        return self.specificity_reference if self.edits_scored else "stated_answer"

    def validation_step(self, piece: ScoredPiece, batch_idx: int) -> None:
        """Score a piece of the stream."""
        records = piece.records
        base = None
        if self.specificity_measured_by == "base_output":
            with self.base_weights():
                base = self.answer(records)
        answers = self.answer(records)
        self._scores.update(score_records(records, answers, self.scoring, base))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the scores of ``validate``."""
        for kind, value in self._scores.compute().items():
            if value is not None:
                self.log(kind, value, logger=False, batch_size=1)

    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, piece: ScoredPiece, batch_idx: int) -> list[dict[str, str]]:
        """Greedy answers to the edits' prompts: ``id``, ``prompt``, ``target``, ``answer``."""
        with self.forward_context():
            answers = self.scorer("greedy_match").answers([record.efficacy for record in piece.records])
        return [
            {
                "id": encoded.record.id,
                "prompt": encoded.record.prompt,
                "target": encoded.record.target,
                "answer": self.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip(),
            }
            for encoded, answer in zip(piece.records, answers, strict=True)
        ]
