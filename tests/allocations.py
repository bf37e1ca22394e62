"""Counting what the allocator hands out: the peak of a stretch of code, work areas inside kernels included."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator had out at one time while ``run`` ran, beyond those before it."""
    held, peak = 0, 0
    for size in _sizes(run):
        held += size
        peak = max(peak, held)
    return peak


def largest_bytes(run: Callable[[], Any]) -> int:
    """The largest single piece of memory that torch's CPU allocator handed out while ``run`` ran."""
    return max(_sizes(run))


def _sizes(run: Callable[[], Any]) -> list[int]:
    """What was taken and, below zero, given back, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    del kept
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]
