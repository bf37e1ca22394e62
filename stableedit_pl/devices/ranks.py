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

from stableedit_pl.devices.rank_watch import RankWatch, lost_ranks

T = TypeVar("T")

_watches: list[RankWatch] = []

_teams: list[tuple[int, ...]] = []
"""Ranks that run the same edits together (tensor parallel), a part of the work for each team; none: a part a rank."""

_team_groups: list[Any] = []
"""The process group of this rank's team."""


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


def team_up(teams: Sequence[Sequence[int]], group: Any = None) -> None:
    """Have work divided among teams whose ranks do the same part of it; with none, among single ranks.

    Args:
        teams: ranks of each; every rank is in one, and all are equally large.
        group: the process group of this rank's own.
    """
    _teams[:] = [tuple(team) for team in teams]
    _team_groups[:] = [group] if _teams else []


def parts() -> int:
    """Into how many parts work is divided."""
    return len(_teams) or world()


def part() -> int:
    """Which part of the work is this process's."""
    return next((number for number, team in enumerate(_teams) if rank() in team), rank())


def _speakers() -> list[int]:
    """The rank that speaks for each part."""
    return [team[0] for team in _teams] or list(range(world()))


def watch_with(watch: RankWatch | None) -> None:
    """Have losses named by ``watch``; None when the ranks part."""
    _watches[:] = [] if watch is None else [watch]


@contextmanager
def noticing_losses(among_others: bool = False) -> Iterator[None]:
    """Report a collective that fails inside as a lost rank.

    Args:
        among_others: more than a collective happens inside (a forward pass of a sharded model): only what the
            communication library says of itself is a loss.

    Raises:
        RanksError: naming the ranks that are missing, where that can be known.
    """
    try:
        yield
    except RanksError:
        raise
    except RuntimeError as error:
        if among_others and not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
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


def gather_parts(value: T) -> list[T]:
    """The value of every part, in order; plain values, pickled."""
    values = gather(value)
    return [values[speaker] for speaker in _speakers()]


def own_part(items: Sequence[T]) -> list[T]:
    """This process's part of items that are divided: every ``parts``-th, each item in one part."""
    return list(items[part() :: parts()])


def largest(value: int) -> int:
    """The largest of all ranks' values."""
    if world() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64, device=device())
    with noticing_losses():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor.item())


def gather_rows(own: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all parts, one part after another.

    Args:
        own: this part's rows, ``[counts[part()], width]``; there may be none.
        counts: how many rows each part has, known to all.

    Returns:
        ``[sum(counts), width]``, dtype and device of ``own``; the same bytes on every rank.

    Raises:
        ValueError: if ``own`` has another number of rows.
    """
    if world() == 1:
        return own
    if own.shape[0] != counts[part()]:
        raise ValueError(f"{own.shape[0]} rows on rank {rank()}, expected {counts[part()]}")
    padded = torch.zeros((max(counts), own.shape[1]), dtype=own.dtype, device=device())
    padded[: own.shape[0]] = own
    pieces = _all_gather(padded)
    spoken = [pieces[speaker][:count] for speaker, count in zip(_speakers(), counts, strict=True)]
    return torch.cat(spoken).to(own.device)


def gather_columns(own: Tensor, width: int) -> Tensor:
    """The columns of all ranks of this rank's team, side by side: what each had of a dimension that they divide.

    Args:
        own: ``[rows, columns here]``, as many rows on each; ``torch.chunk`` says how many columns.
        width: of all together.

    Returns:
        ``[rows, width]``, dtype and device of ``own``.
    """
    (team,) = (team for team in _teams if rank() in team)
    most = -(-width // len(team))
    padded = torch.zeros((own.shape[0], most), dtype=own.dtype, device=device())
    padded[:, : own.shape[1]] = own
    return torch.cat(_all_gather(padded, _team_groups[0], len(team)), dim=1)[:, :width].to(own.device)


def team_size() -> int:
    """Ranks that hold layers in parts together with this one, itself included."""
    (team,) = (team for team in _teams if rank() in team)
    return len(team)


def gather_equal(own: Tensor) -> Tensor:
    """Every rank's rows, as many on each, one rank after another; dtype and device of ``own``."""
    return torch.cat(_all_gather(own.to(device()))).to(own.device)


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
    """The tensor of every part, of one shape: how torchmetrics is to fetch the states of a metric."""
    flat = own.reshape(1, -1)
    gathered = gather_rows(flat, [1] * parts())
    return [row.reshape(own.shape) for row in gathered]


def _all_gather(own: Tensor, group: Any = None, count: int | None = None) -> list[Tensor]:
    own = own.contiguous()
    pieces = [torch.empty_like(own) for _ in range(count or world())]
    with noticing_losses():
        dist.all_gather(pieces, own, group=group)
    return pieces


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
        checksums: name to checksum; a name is compared among the ranks that have it.
        turn: after which turn, for the message.

    Raises:
        RanksError: on every rank, naming what differs, and where.
    """
    if world() == 1:
        return
    everywhere = gather(checksums)
    listed = []
    for name in dict.fromkeys(name for theirs in everywhere for name in theirs):
        first, *others = [one for one, theirs in enumerate(everywhere) if name in theirs]
        wrong = [one for one in others if everywhere[one][name] != everywhere[first][name]]
        if wrong:
            against = "" if first == 0 else f" (held against rank {first})"
            listed.append(f"{name} on rank {', '.join(map(str, wrong))}{against}")
    if listed:
        raise RanksError(
            f"After turn {turn} the ranks do not hold the same bytes as rank 0: {'; '.join(listed)}. Memory or "
            "arithmetic of a machine is at fault; nothing of it was saved. Go on with --ckpt_path last."
        )
