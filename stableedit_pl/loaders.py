"""Loaders of the stream: turns to apply, and pieces to score."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from stableedit_pl.record_encoding import EncodedRecord, ScoredPiece
from stableedit_pl.turns import Turn


class TurnLoader(DataLoader[Turn]):
    """Loads turns. The position is the trainer's ``global_step``; Lightning asks stateful loaders for theirs."""

    def state_dict(self) -> dict[str, Any]:
        """Where the position is."""
        return {"position": "global_step"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the sampler started at the committed turns already."""


class ScoredPieces(Dataset[ScoredPiece]):
    """Pieces of the target stream by index, encoded when asked."""

    def __init__(self, scored: Callable[[Sequence[int]], list[EncodedRecord]], pieces: list[list[int]]) -> None:
        """Pieces of row numbers, and what makes records of them."""
        self.scored = scored
        self.pieces = pieces

    def __len__(self) -> int:
        """Number of pieces."""
        return len(self.pieces)

    def __getitem__(self, index: int) -> ScoredPiece:
        """One piece."""
        return ScoredPiece(self.scored(self.pieces[index]))


def as_is(item: Any) -> Any:
    """Keep what the dataset made; PyTorch's default would turn numbers and tuples into tensors."""
    return item
