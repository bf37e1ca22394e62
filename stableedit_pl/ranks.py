"""Collectives of the ranks of a run, all of which do nothing with one process.

Every rank must call them in the same order. A collective that fails is reported as :class:`RanksError`, which names
the rank that is missing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stableedit_pl.rank_watch import RankWatch, lost_ranks

T = TypeVar("T")

_watches: list[RankWatch] = []


class RanksError(RuntimeError):
    """A rank is lost, or the ranks do not agree; the message says which and what to do."""


def world() -> int:
    """Number of ranks; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def device() -> torch.device:
    """Where tensors must be for a collective."""
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")


def watch_with(watch: RankWatch | None) -> None:
    """Have losses named by ``watch``; None when the ranks part."""
    _watches[:] = [] if watch is None else [watch]


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Report a collective that fails inside as a lost rank.

    Raises:
        RanksError: naming the ranks that are missing, where that can be known.
    """
    try:
        yield
    except RanksError:
        raise
    except RuntimeError as error:
        raise RanksError(_account_of(error)) from error


def _account_of(error: RuntimeError) -> str:
    advice = "The last checkpoint is whole: go on with --ckpt_path last, on any number of processes."
    missing = _watches[0].missing() if _watches else []
    if not missing:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"Rank {rank()} of {world()}: the ranks lost touch ({reason}). {advice}"
    said = [f"rank {one} said: {text}" for one in missing for text in [_watches[0].said(one)] if text is not None]
    return f"{lost_ranks(missing)}, as rank {rank()} of {world()} noticed. {' '.join([*said, advice])}"


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank; plain values, pickled."""
    if world() == 1:
        return value
    holder = [value]
    with noticing_losses():
        dist.broadcast_object_list(holder, src=0, device=device())
    return holder[0]


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of ranks; plain values, pickled."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with noticing_losses():
        dist.all_gather_object(values, value)
    return values


def own_part(items: Sequence[T]) -> list[T]:
    """This rank's part of items that the ranks divide: every ``world``-th, each item at one rank."""
    return list(items[rank() :: world()])


def largest(value: int) -> int:
    """The largest of all ranks' values."""
    if world() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64, device=device())
    with noticing_losses():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def gather_rows(own: Tensor, counts: Sequence[int]) -> Tensor:
    """All ranks' rows, one rank after another.

    Args:
        own: this rank's rows, ``[counts[rank()], width]``; there may be none.
        counts: how many rows each rank has, known to all.

    Returns:
        ``[sum(counts), width]``, dtype and device of ``own``; the same bytes on every rank.

    Raises:
        ValueError: if ``own`` has another number of rows.
    """
    if world() == 1:
        return own
    if own.shape[0] != counts[rank()]:
        raise ValueError(f"{own.shape[0]} rows on rank {rank()}, expected {counts[rank()]}")
    padded = torch.zeros((max(counts), own.shape[1]), dtype=own.dtype, device=device())
    padded[: own.shape[0]] = own
    parts = [torch.empty_like(padded) for _ in counts]
    with noticing_losses():
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(own.device)


def send_to_all(numbers: Tensor, source: int) -> None:
    """Fill a tensor, of one shape on every rank, with rank ``source``'s, in place.

    Args:
        numbers: on :func:`device`, contiguous.
        source: whose numbers.
    """
    if world() > 1:
        with noticing_losses():
            dist.broadcast(numbers, src=source)


def gather_same(own: Tensor, group: Any = None) -> list[Tensor]:
    """Every rank's tensor of one shape: how torchmetrics is to fetch the states of a metric."""
    flat = own.reshape(1, -1)
    gathered = gather_rows(flat, [1] * world())
    return [row.reshape(own.shape) for row in gathered]


def fingerprint(tensor: Tensor) -> int:
    """A checksum of a tensor's bytes, made where it is; exact in integers, so that every single change shows.

    Args:
        tensor: any dtype of 1, 2, 4 or 8 bytes.
    """
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().reshape(tensor.shape or (1,)).view(whole)
    bits = bits.reshape(bits.shape[0], -1)
    columns = _odd(bits.shape[1], bits.device)
    step = max((1 << 22) // max(bits.shape[1], 1), 1)  # rows at a time, so that little memory is needed
    rows = [(bits[start : start + step] * columns).sum(dim=1) for start in range(0, len(bits), step)]
    total = (torch.cat(rows) * _odd(len(bits), bits.device)).sum() if rows else 0
    return int(total)


def _odd(count: int, where: torch.device) -> Tensor:
    """Odd weights, 1, 3, 5 ...: times one of them no difference vanishes modulo 2^64."""
    return 2 * torch.arange(count, dtype=torch.int64, device=where) + 1


def refuse_disagreement(checksums: dict[str, int], turn: int) -> None:
    """Hold all ranks' checksums against one another.

    Args:
        checksums: name to checksum, the same names everywhere.
        turn: after which turn, for the message.

    Raises:
        RanksError: on every rank, naming what differs, and where.
    """
    if world() == 1:
        return
    everywhere = gather(checksums)
    wrong = {
        name: [one for one, theirs in enumerate(everywhere) if theirs.get(name) != everywhere[0].get(name)]
        for name in everywhere[0]
    }
    listed = [f"{name} on rank {', '.join(map(str, ranks))}" for name, ranks in wrong.items() if ranks]
    if listed:
        raise RanksError(
            f"After turn {turn} the ranks do not hold the same bytes as rank 0: {'; '.join(listed)}. Memory or "
            "arithmetic of a machine is at fault; nothing of it was saved. Go on with --ckpt_path last."
        )
