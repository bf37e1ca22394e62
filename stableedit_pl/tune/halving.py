"""Successive halving: many candidates for a few turns, the best of them for more, within the time there is."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stableedit_pl.tune.bench import Bench, Stream
from stableedit_pl.tune.candidates import Candidate
from stableedit_pl.tune.outcome import Goal

KEPT = 1 / 3
"""Part of a round's streams that goes on."""

FIRST_ROUND = 0.6
"""Share of the time in which candidates are begun; the first ones on each site set take the longest."""

LEAST = 3
"""Candidates that are begun on the slowest of machines: with fewer there is nothing to choose."""


@dataclass(frozen=True)
class Budget:
    """How long a search may take.

    Attributes:
        seconds: on the clock; the order of candidates is fixed by the seed, how many are begun is not.
        trials: so many are begun, whatever the clock says: the same search on any machine. None: by the clock.
    """

    seconds: float
    trials: int | None = None


def rounds_of(turns: int) -> list[int]:
    """Turns that a stream has had after each round: one turn misleads, so that the first round has two."""
    lengths = [min(2, turns)]
    while lengths[-1] < turns:
        lengths.append(min(2 * lengths[-1], turns))
    return lengths


def halve(
    bench: Bench,
    queue: Sequence[Candidate],
    budget: Budget,
    goal: Goal,
    report: Callable[[str, list[Stream]], None],
) -> list[Stream]:
    """Search.

    Args:
        bench: runs streams.
        queue: what to try, in this order.
        budget: candidates are begun for ``FIRST_ROUND`` of its time, and those that go on have the rest.
        goal: ranks streams.
        report: called after every stream with what is being done and all streams.

    Returns:
        All streams, also after Ctrl-C.
    """
    streams: list[Stream] = []
    lengths = rounds_of(len(bench.turns))
    started = time.perf_counter()
    try:
        for candidate in queue:
            spent = time.perf_counter() - started
            late = spent >= budget.seconds * FIRST_ROUND and len(streams) >= LEAST
            if late if budget.trials is None else len(streams) >= budget.trials:
                break
            stream = bench.begin(candidate)
            bench.advance(stream, lengths[0])
            streams.append(stream)
            report(f"round 1 of {len(lengths)}, {lengths[0]} turns", streams)
        going = list(streams)
        for number, length in enumerate(lengths[1:], start=2):
            going = goal.ranked(going)[: max(1, round(len(going) * KEPT))]
            for stream in going:
                if stream.failed is not None:
                    continue
                cost = stream.seconds / max(stream.turns, 1) * (length - stream.turns)
                late = time.perf_counter() - started + cost > budget.seconds * 1.1
                if budget.trials is None and late and stream is not going[0]:
                    continue
                bench.advance(stream, length)
                report(f"round {number} of {len(lengths)}, {length} turns", streams)
            going = [stream for stream in going if stream.turns == length] or going
    except KeyboardInterrupt:
        report("stopped", streams)
    return streams
