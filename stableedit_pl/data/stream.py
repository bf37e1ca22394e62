"""``EditStream``: the ordered, epoch-free sequence of turns, as a Lightning data module."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from stableedit_pl.data.loaders import ScoredPieces, TurnLoader, as_is
from stableedit_pl.data.readers import file_checksum, read_records
from stableedit_pl.data.record_encoding import EncodedRecord, RecordEncoder
from stableedit_pl.data.records import EditRecord
from stableedit_pl.data.row_digest import RowDigest
from stableedit_pl.data.turns import TurnBuilder, TurnDataset, TurnSampler, TurnSchedule, WarmUpSettings
from stableedit_pl.demo import demo_path
from stableedit_pl.errors import SettingError, refuse_differences
from stableedit_pl.model.encoding import Encoder, chunks
from stableedit_pl.model.loading import DEMO
from stableedit_pl.model.micro_batches import Batching

OWN_ROWS = 2
"""Answer tokens per dimension with which a covariance is more data than prior."""

Dataset = Literal["edits", "zsre", "counterfact", "fever", "wikibigedit", "ultraeditbench"]


class EditStream(LightningDataModule):
    """The stream of edits: target edits in file order, with the warm-up stream put in by the ``WarmUp`` callback.

    Nothing is shuffled or dropped; a short last turn is a turn.

    Args:
        path: file of the target stream; ``demo`` for the stream shipped with the package.
        dataset: format of ``path`` and ``warmup_path``.
        warmup_path: file of the warm-up stream, used by the WarmUp callback; ``demo`` for the shipped one.
        turn_size: edits applied together in one turn.
        micro_batch_tokens: tokens per forward pass inside a turn, padding included; changes memory, not results. Edits
            of similar length go together.
        micro_batch_size: most edits per forward pass; null for no limit but the tokens. With ``loss_reduction:
            micro_batch_mean`` it is part of the method: consecutive pieces of exactly so many edits.
        max_edits: use only the first so many edits of ``path``; rows behind them are not looked at.
        edit_order: order inside a turn: as in the file, or by decreasing encoded length (the published program).
        count_bare_space: score the lone space token that some sentencepiece tokenizers put before a target, as
            the published program does.
        on_bad_row: ``raise`` on rows that cannot be used, or ``skip`` them with a warning that lists them.
        evaluation_batch_size: edits read at a time by ``validate``, ``test`` and ``predict``.
        validation_size: edits that ``validate`` scores, drawn at a fixed seed; ``test`` scores all.
        num_workers: processes that tokenize turns ahead of the editing; 0 for a thread, one turn ahead.
    """

    def __init__(
        self,
        path: str,
        dataset: Dataset = "edits",
        warmup_path: str | None = None,
        turn_size: int = 100,
        micro_batch_tokens: int = 1024,
        micro_batch_size: int | None = None,
        max_edits: int | None = None,
        edit_order: Literal["file", "longest_first"] = "file",
        count_bare_space: bool = False,
        on_bad_row: Literal["raise", "skip"] = "raise",
        evaluation_batch_size: int = 256,
        validation_size: int = 200,
        num_workers: int = 0,
    ) -> None:
        """See the class.

        Raises:
            SettingError: if a size is not positive.
        """
        super().__init__()
        self.save_hyperparameters()
        sizes = {
            "turn_size": turn_size,
            "micro_batch_tokens": micro_batch_tokens,
            "micro_batch_size": 1 if micro_batch_size is None else micro_batch_size,
            "evaluation_batch_size": evaluation_batch_size,
            "validation_size": validation_size,
            "max_edits": 1 if max_edits is None else max_edits,
        }
        for name, value in sizes.items():
            if value < 1:
                raise SettingError(f"data.{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise SettingError(f"data.num_workers must be zero or positive, got {num_workers}")
        for name, file in (("path", path), ("warmup_path", warmup_path)):
            if file is not None and not str(file):
                raise SettingError(f"data.{name} is empty: give a file, or demo")
        self.path, self.dataset = path, dataset
        self.warmup_path = warmup_path
        self.turn_size = turn_size
        self.micro_batch_tokens, self.micro_batch_size = micro_batch_tokens, micro_batch_size
        self.max_edits = max_edits
        self.edit_order = edit_order
        self.count_bare_space = count_bare_space
        self.on_bad_row: Literal["raise", "skip"] = on_bad_row
        self.evaluation_batch_size, self.validation_size = evaluation_batch_size, validation_size
        self.num_workers = num_workers
        self.warm_up: WarmUpSettings | None = None
        self._turns_to_find = False
        self.target: list[EditRecord] = []
        self.warmup: list[EditRecord] = []
        self._encoder: Encoder | None = None
        self._digests = {"edit": RowDigest(), "warmup": RowDigest()}

    def use_warm_up(self, settings: WarmUpSettings) -> None:
        """Put the warm-up into the turns; called by the WarmUp callback before the first turn.

        Without a warm-up stream the statistics can be fed from the target stream's own first turns: as many as hold
        ``OWN_ROWS`` answer tokens for each dimension of the model's hidden state, unless ``turns`` is given.

        Raises:
            SettingError: if there is no warm-up stream, and edits are wanted from it, or another position.
        """
        if settings.position != "none" and self.warmup_path is None:
            if settings.mode == "edit" or settings.position != "start":
                raise SettingError(
                    "the WarmUp callback needs a warm-up stream: set data.warmup_path. Without one it can feed the "
                    "statistics from the stream's own first turns (mode: statistics_only, position: start), or be "
                    "left out (position: none)"
                )
            self._turns_to_find = settings.turns is None
            settings = replace(settings, own_stream=True, turns=settings.turns or self._turns_with_enough_rows())
        self.warm_up = settings

    def _turns_with_enough_rows(self) -> int:
        wanted = OWN_ROWS * self.trainer.lightning_module.hidden_size()  # type: ignore[union-attr,operator]
        encoder, rows = self.target_encoder, 0
        for place, record in enumerate(self.target):
            rows += len(encoder(record).target_ids)
            if rows >= wanted:
                return place // self.turn_size + 1
        return -(-len(self.target) // self.turn_size)

    def setup(self, stage: str) -> None:
        """Read the files and check every row against the tokenizer and the model's context.

        Raises:
            DataError: naming file, row and field of every row that cannot be used.
        """
        if self.target:
            return
        self._encoder = self.trainer.lightning_module.encoder(self.count_bare_space)  # type: ignore[union-attr,operator]
        self.target = read_records(self.dataset, self.target_file, on_bad_row=self.on_bad_row, most=self.max_edits)
        self.target_encoder.check(self.target)
        if self.warmup_path is not None and stage == "fit":
            self.warmup = read_records(self.dataset, self.warmup_file, on_bad_row=self.on_bad_row)
            self._record_encoder(self.warmup_file).check(self.warmup)

    @property
    def target_file(self) -> Path:
        """The target stream's file."""
        return self._file(self.path, "edits")

    @property
    def warmup_file(self) -> Path:
        """The file of the warm-up's edits; without a warm-up stream these are the target stream's own."""
        return self.target_file if self.warmup_path is None else self._file(self.warmup_path, "warmup")

    @property
    def warmup_records(self) -> list[EditRecord]:
        """Those of the warm-up turns: of the warm-up stream, or of the target stream itself."""
        return self.target if self.warm_up is not None and self.warm_up.own_stream else self.warmup

    @property
    def target_encoder(self) -> RecordEncoder:
        """Encodes target records."""
        return self._record_encoder(self.target_file)

    @property
    def schedule(self) -> TurnSchedule:
        """Which rows each turn holds.

        Raises:
            SettingError: if there is a warm-up stream but nothing that says how it is used.
        """
        if self.warmup_path is not None and self.warm_up is None:
            raise SettingError(
                "data.warmup_path is set, but nothing uses it: add the callback WarmUp "
                "(--trainer.callbacks+=WarmUp), or set data.warmup_path to null"
            )
        settings = self.warm_up or WarmUpSettings(position="none")
        return TurnSchedule(len(self.target), len(self.warmup), self.turn_size, settings)

    def applied_rows(self, turns: int, rejected: Sequence[int]) -> Sequence[int]:
        """Rows of the target stream that are applied once ``turns`` turns are committed.

        Args:
            turns: committed turns.
            rejected: indices of those of which nothing was applied.

        Returns:
            Ascending; a range when nothing was rejected.
        """
        applied = range(self.schedule.target_edits_before(turns))
        slots = [self.schedule.slot(turn) for turn in rejected]
        lost = {row for slot in slots if slot.phase == "edit" for row in slot.rows}
        return [row for row in applied if row not in lost] if lost else applied

    def turn_rows(self, looked_at: int = 30) -> int:
        """Answer tokens of a turn: of the largest among some turns of either stream, evenly spaced.

        Args:
            looked_at: turns of each stream whose edits are encoded; all, where there are no more.
        """
        largest = 0
        for records, file in ((self.target, self.target_file), (self.warmup, self.warmup_file)):
            starts = range(0, len(records), self.turn_size)
            encoder = self._record_encoder(file)
            for start in starts[:: -(-len(starts) // looked_at) or 1]:
                turn = records[start : start + self.turn_size]
                largest = max(largest, sum(len(encoder(record).target_ids) for record in turn))
        return largest

    def checksums(self) -> dict[str, str]:
        """SHA-256 of the target file, and of the warm-up file where there is one."""
        files = {"path": self.target_file}
        if self.warmup_path is not None:
            files["warmup_path"] = self.warmup_file
        return {name: file_checksum(path) for name, path in files.items()}

    def train_dataloader(self) -> TurnLoader:
        """The turns that are not committed yet."""
        schedule = self.schedule
        start = 0 if self.trainer is None else self.trainer.global_step
        build = TurnBuilder(
            {"edit": self.target, "warmup": self.warmup_records},
            {"edit": self.target_encoder, "warmup": self._record_encoder(self.warmup_file)},
            Batching(self.micro_batch_tokens, self.micro_batch_size, self._averages_micro_batches()),
            self.edit_order == "longest_first",
            schedule.warm_up,
        )
        return TurnLoader(
            TurnDataset(schedule, build),
            sampler=TurnSampler(len(schedule), start),
            batch_size=None,
            collate_fn=as_is,
            num_workers=self.num_workers,
        )

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Turns hold text and token ids; capture moves one micro-batch at a time."""
        return batch

    # ---- what a resumed run must find again

    def state_dict(self) -> dict[str, Any]:
        """How turns are made of rows, and a digest of the rows that are applied."""
        schedule = self.schedule
        turns = 0 if self.trainer is None else self.trainer.global_step
        target = schedule.target_edits_before(turns)
        warmup = schedule.warmup_edits_before(turns)
        return {
            "turn_size": self.turn_size,
            "edit_order": self.edit_order,
            "count_bare_space": self.count_bare_space,
            # Anywhere else the micro-batch is a matter of memory; in this reduction it is part of the method.
            "micro_batch_size": self.micro_batch_size if self._averages_micro_batches() else None,
            "warm_up": schedule.warm_up.plain(),
            "first_warmup_turn": schedule.first_warmup_turn if schedule.warmup_turns else None,
            "turns": turns,
            "applied": {"edit": target, "warmup": warmup},
            "digests": {
                "edit": self._digests["edit"].of_first(self.target, target),
                "warmup": self._digests["warmup"].of_first(self.warmup_records, warmup),
            },
        }

    def _averages_micro_batches(self) -> bool:
        editor = getattr(self.trainer, "lightning_module", None)
        averages = getattr(editor, "loss_reduction", "token_sum") == "micro_batch_mean"
        if averages and self.micro_batch_size is None:
            raise SettingError(
                "model.loss_reduction micro_batch_mean averages over each micro-batch, so that its size is part of the "
                "method: set data.micro_batch_size (the published program: 10)"
            )
        return averages

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold this stream against the one a run began with; scoring another stream is fine.

        Raises:
            IncompatibleCheckpoint: if turns would be made differently, or applied rows are not the same. The stream
                may have grown behind them.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        if self._turns_to_find and self.warm_up is not None:  # a stream that grew has more; the run began with these
            self.warm_up = replace(self.warm_up, turns=state_dict["warm_up"]["turns"])
        schedule, turns = self.schedule, state_dict["turns"]
        applied = {
            "edit": schedule.target_edits_before(turns),
            "warmup": schedule.warmup_edits_before(turns),
        }
        now = self.state_dict() | {
            "turns": turns,
            "applied": applied,
            "digests": {
                "edit": RowDigest().of_first(self.target, applied["edit"]),
                "warmup": RowDigest().of_first(self.warmup_records, applied["warmup"]),
            },
        }
        refuse_differences("the checkpoint's stream", state_dict, now)

    def val_dataloader(self) -> Any:
        """A fixed sample of the target stream in pieces; nothing during ``fit``, where a callback evaluates."""
        if self.trainer is not None and self.trainer.state.fn == "fit":
            return []
        return self._scored_loader(self.sample(self.validation_size, seed=0))

    def test_dataloader(self) -> Any:
        """The whole target stream in pieces."""
        return self._scored_loader(range(len(self.target)))

    def predict_dataloader(self) -> Any:
        """The whole target stream in pieces."""
        return self.test_dataloader()

    def sample(self, size: int, seed: int) -> list[int]:
        """Rows of a sample of the target stream, ascending; the same for the same seed and stream length."""
        rows = range(len(self.target))
        return sorted(random.Random(seed).sample(rows, min(size, len(rows))))

    def scored(self, rows: Any) -> list[EncodedRecord]:
        """Records of the target stream with everything that scores them."""
        encoder = self.target_encoder
        return [encoder.scored(self.target[row]) for row in rows]

    def _scored_loader(self, rows: Any) -> Any:
        pieces = list(chunks(rows, self.evaluation_batch_size))
        return DataLoader(ScoredPieces(self.scored, pieces), batch_size=None, collate_fn=as_is)

    def _record_encoder(self, path: Path) -> RecordEncoder:
        if self._encoder is None:
            raise RuntimeError("EditStream.setup has not run: the stream needs a trainer with a LifelongEditor")
        return RecordEncoder(self._encoder, path)

    @staticmethod
    def _file(path: str, demo_name: str) -> Path:
        return demo_path(f"{demo_name}.jsonl") if path == DEMO else Path(path).expanduser()
