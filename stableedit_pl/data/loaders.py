"""Loaders of the stream: turns to apply, and pieces to score."""

from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from stableedit_pl.data.record_encoding import EncodedRecord, ScoredPiece
from stableedit_pl.data.turns import Turn
from stableedit_pl.devices import ranks

T = TypeVar("T")


class TurnLoader(DataLoader[Turn]):
    """Loads turns. The position is the trainer's ``global_step``; Lightning asks stateful loaders for theirs.

    Without worker processes, a thread builds the next turn while the current one is edited.
    """

    def __iter__(self) -> Any:
        """The turns that are left."""
        turns = super().__iter__()
        return turns if self.num_workers else OneAhead(turns)

    def state_dict(self) -> dict[str, Any]:
        """Where the position is."""
        return {"position": "global_step"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the sampler started at the committed turns already."""


class OneAhead(Generic[T]):
    """Makes the next item while the current one is used; never more than that one.

    Each item has a thread of its own, which ends with it. So there is none to stop, however the loop that uses the
    items comes to its end.

    Args:
        items: an iterator, from here on used by this class alone.
    """

    def __init__(self, items: Iterator[T]) -> None:
        """See the class."""
        self._items = items
        self._next: _Making[T] | None = None

    def __iter__(self) -> "OneAhead[T]":
        """This is its own iterator."""
        return self

    def __next__(self) -> T:
        """The next item; the one after it is begun.

        Raises:
            StopIteration: when there are no more.
            BaseException: what making this very item raised.
        """
        making = self._next or _Making(self._items)
        # Kept until the item is there: Ctrl-C may interrupt the wait.
        self._next = making
        item = making.result()
        self._next = None
        if isinstance(item, _Failure):
            raise item.error
        self._next = _Making(self._items)
        return item


class _Failure:
    """What making an item raised; also the end of the items."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Making(Generic[T]):
    """One item in the making."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._item: T | _Failure | None = None
        # No daemon: one that is still in a tokenizer when the interpreter ends would bring it down.
        self._thread = Thread(target=self._make, name="next turn")
        self._thread.start()

    def _make(self) -> None:
        try:
            self._item = next(self._items)
        except BaseException as error:  # handed on to where the item is asked for
            self._item = _Failure(error)

    def result(self) -> T | _Failure:
        self._thread.join()
        assert self._item is not None
        return self._item


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
        """One piece, this rank's part of it: every rank goes through all pieces, and meets the others at the end."""
        return ScoredPiece(self.scored(ranks.own_part(self.pieces[index])))


def as_is(item: Any) -> Any:
    """Keep what the dataset made; PyTorch's default would turn numbers and tuples into tensors."""
    return item
