"""Turns: which edits are applied together, and in which order the turns come.

The position in the stream *is* the number of committed turns. A schedule maps any turn index to its rows
without walking there, so that a resumed run starts at the next turn and nowhere else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch.utils.data import Dataset, Sampler

from stableedit_pl.data.records import EditRecord
from stableedit_pl.method.normalization import Normalization
from stableedit_pl.model.encoding import Encoding
from stableedit_pl.model.micro_batches import MicroBatches

Phase = Literal["warmup", "edit"]
WarmUpMode = Literal["edit", "statistics_only"]
WarmUpPosition = Literal["start", "q1", "middle", "q3", "end", "none"]

_QUARTERS = {"start": 0, "q1": 1, "middle": 2, "q3": 3, "end": 4}


@dataclass(frozen=True, slots=True)
class EncodedEdit:
    """One edit with the encoding of its prompt and target."""

    record: EditRecord
    encoding: Encoding


class Turn:
    """The edits applied together: what ``training_step`` receives.

    Not a dataclass: Lightning's half precision walks into those looking for tensors, and rebuilds them.

    Attributes:
        index: 0-based position in the stream, warm-up turns included.
        phase: ``warmup`` or ``edit``.
        edits: in the order in which they are captured.
        micro_batches: which edits go through the model together.
        update_weights: False for a warm-up turn that only feeds the statistics.
        normalization: what this turn uses instead of the editor's own; None for the editor's own.
        counted_in: the warm-up turn that fed these edits to the statistics already; None if none did.
    """

    def __init__(
        self,
        index: int,
        phase: Phase,
        edits: tuple[EncodedEdit, ...],
        micro_batches: MicroBatches,
        update_weights: bool = True,
        normalization: Normalization | None = None,
        counted_in: int | None = None,
    ) -> None:
        """See the class."""
        self.counted_in = counted_in
        self.index = index
        self.phase: Phase = phase
        self.edits = edits
        self.micro_batches = micro_batches
        self.update_weights = update_weights
        self.normalization = normalization


@dataclass(frozen=True, slots=True)
class WarmUpSettings:
    """How the warm-up stream enters the run.

    Attributes:
        position: before which quarter of the target stream's turns it comes; ``none`` leaves it out.
        mode: ``edit`` applies warm-up edits to the weights too; ``statistics_only`` feeds the statistics alone.
        turns: use only the first so many turns of the warm-up stream; None for all.
        normalization: method of warm-up turns; None for the editor's own.
        own_stream: its edits are those of the target stream's first turns, which feed the statistics before they are
            applied.
    """

    position: WarmUpPosition = "start"
    mode: WarmUpMode = "edit"
    turns: int | None = None
    normalization: Normalization | None = None
    own_stream: bool = False

    def plain(self) -> dict[str, Any]:
        """As checkpoints keep it; those from before there was ``own_stream`` do not have it."""
        return {name: value for name, value in asdict(self).items() if name != "own_stream" or value}


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a turn's rows are: ``rows`` of the warm-up or target records; ``counted_in`` as in :class:`Turn`."""

    phase: Phase
    rows: range
    counted_in: int | None = None


@dataclass(frozen=True)
class TurnSchedule:
    """Maps turn indices to rows.

    Attributes:
        target_rows: number of edits in the target stream.
        warmup_rows: number of edits in the warm-up stream (0: no warm-up).
        turn_size: edits per turn; the last turn of either stream may be shorter.
        warm_up: how the warm-up enters.
    """

    target_rows: int
    warmup_rows: int
    turn_size: int
    warm_up: WarmUpSettings

    @property
    def target_turns(self) -> int:
        """Turns of the target stream."""
        return -(-self.target_rows // self.turn_size)

    @property
    def warmup_turns(self) -> int:
        """Warm-up turns that are really used."""
        if self.warm_up.position == "none":
            return 0
        available = -(-self._warmup_rows // self.turn_size)
        return available if self.warm_up.turns is None else min(self.warm_up.turns, available)

    @property
    def first_warmup_turn(self) -> int:
        """Index of the turn at which the warm-up begins."""
        return self.target_turns * _QUARTERS.get(self.warm_up.position, 0) // 4

    def __len__(self) -> int:
        """All turns, warm-up included."""
        return self.target_turns + self.warmup_turns

    def slot(self, turn: int) -> Slot:
        """Phase and rows of a turn.

        Raises:
            IndexError: beyond the last turn.
        """
        if not 0 <= turn < len(self):
            raise IndexError(f"turn {turn} of a stream of {len(self)} turns")
        begin, length = self.first_warmup_turn, self.warmup_turns
        if begin <= turn < begin + length:
            return Slot("warmup", self._rows(turn - begin, self._warmup_rows))
        target = turn if turn < begin else turn - length
        fed = self.warm_up.own_stream and target < length
        return Slot("edit", self._rows(target, self.target_rows), begin + target if fed else None)

    def target_edits_before(self, turn: int) -> int:
        """How many target edits have been applied once ``turn`` turns are committed."""
        target_turns = turn - self.warmup_turns_before(turn)
        return min(target_turns * self.turn_size, self.target_rows)

    def warmup_turns_before(self, turn: int) -> int:
        """How many of the first ``turn`` turns are warm-up turns."""
        return min(max(turn - self.first_warmup_turn, 0), self.warmup_turns)

    def warmup_edits_before(self, turn: int) -> int:
        """How many warm-up edits have been applied once ``turn`` turns are committed."""
        return min(self.warmup_turns_before(turn) * self.turn_size, self._warmup_rows)

    @property
    def _warmup_rows(self) -> int:
        return self.target_rows if self.warm_up.own_stream else self.warmup_rows

    def _rows(self, turn: int, total: int) -> range:
        return range(turn * self.turn_size, min((turn + 1) * self.turn_size, total))


class TurnDataset(Dataset[Turn]):
    """Turns by index; encodes when asked, so that a long stream is never held as tokens.

    Args:
        schedule: maps turn indices to rows.
        build: makes the turn of an index and its rows.
    """

    def __init__(self, schedule: TurnSchedule, build: Callable[[int, Slot], Turn]) -> None:
        """See the class."""
        self.schedule = schedule
        self.build = build

    def __len__(self) -> int:
        """All turns of the stream."""
        return len(self.schedule)

    def __getitem__(self, index: int) -> Turn:
        """The turn at ``index``."""
        return self.build(index, self.schedule.slot(index))


class TurnSampler(Sampler[int]):
    """Turn indices from ``start`` to the end.

    Its length is that of the *whole* stream: Lightning counts a resumed run's turns from the beginning, and a
    length that shrank to the rest would stop it early.
    """

    def __init__(self, total: int, start: int) -> None:
        """Indices ``start .. total - 1``."""
        self.total = total
        self.start = start

    def __len__(self) -> int:
        """Turns of the whole stream."""
        return self.total

    def __iter__(self) -> Iterator[int]:
        """The turns that are left."""
        return iter(range(self.start, self.total))


class TurnBuilder:
    """Makes a turn of a slot; picklable, so that loader processes can do it.

    Args:
        records: phase to the records of its stream.
        encoders: phase to what encodes its records.
        batching: makes a turn's micro-batches of its edits' lengths in tokens.
        longest_first: sort a turn's edits by decreasing encoded length (stable).
        warm_up: how warm-up turns are treated.
    """

    def __init__(
        self,
        records: Mapping[Phase, Sequence[EditRecord]],
        encoders: Mapping[Phase, Callable[[EditRecord], Encoding]],
        batching: Callable[[Sequence[int]], MicroBatches],
        longest_first: bool,
        warm_up: WarmUpSettings,
    ) -> None:
        """See the class."""
        self.records = records
        self.encoders = encoders
        self.batching = batching
        self.longest_first = longest_first
        self.warm_up = warm_up

    def __call__(self, index: int, slot: Slot) -> Turn:
        """The turn at ``index``, whose rows are ``slot``."""
        records, encode = self.records[slot.phase], self.encoders[slot.phase]
        edits = [EncodedEdit(records[row], encode(records[row])) for row in slot.rows]
        if self.longest_first:
            edits.sort(key=lambda edit: len(edit.encoding.input_ids), reverse=True)
        micro_batches = self.batching([len(edit.encoding.input_ids) for edit in edits])
        if slot.phase == "edit":
            return Turn(index, "edit", tuple(edits), micro_batches, counted_in=slot.counted_in)
        return Turn(
            index,
            "warmup",
            tuple(edits),
            micro_batches,
            update_weights=self.warm_up.mode == "edit",
            normalization=self.warm_up.normalization,
        )
