"""A model of a turn's cost over processes: from measured parts, or from assumed speeds of devices."""

from dataclasses import dataclass

from stableedit_pl.method.inverse_root import root_operations
from stableedit_pl.method.ridge import ridge_operations


@dataclass(frozen=True)
class Parts:
    """Seconds of a turn that one process does alone.

    Attributes:
        capture: forward and backward; divided over the ranks by tokens.
        moments: done by every rank.
        solve: whitening and ridge of all sites; divided by sites, or done by every rank.
        commit: done by every rank.
        sites: how many there are to divide.
    """

    capture: float
    moments: float
    solve: float
    commit: float
    sites: int


@dataclass(frozen=True)
class Link:
    """What connects the ranks.

    Attributes:
        start: seconds of a collective whatever its size.
        rate: bytes per second.
    """

    start: float
    rate: float


def predicted(lone: Parts, count: int, cores: int, link: Link, gathered: float, sent: float, divided: bool) -> float:
    """Seconds of a turn on so many processes, of which only ``cores`` compute at a time.

    Args:
        lone: the same turn alone.
        count: processes.
        cores: of the machine.
        link: between them.
        gathered: bytes of rows that each receives.
        sent: bytes of solutions.
        divided: sites are solved at one rank each.
    """
    if count == 1:
        return lone.capture + lone.moments + lone.solve + lone.commit
    crowd = max(count / cores, 1.0)
    most = -(-lone.sites // count) if divided else lone.sites
    solve = lone.solve * most / lone.sites * (max(min(count, lone.sites) / cores, 1.0) if divided else crowd)
    wires = 2 * link.start + gathered / link.rate
    wires += min(count, lone.sites) * link.start + sent / link.rate if divided else 0.0
    return lone.capture / count * crowd + solve + (lone.moments + lone.commit) * crowd + wires


@dataclass(frozen=True)
class Gpu:
    """An assumed GPU and its links; none of these numbers was measured here.

    Attributes:
        half: bfloat16 operations per second that forward and backward reach.
        double: float64 operations per second of matrix products and factorizations.
        memory: bytes per second.
        near: bytes per second to the GPUs of the same machine.
        far: bytes per second to other machines.
        start: seconds of a collective whatever its size.
        machine: GPUs of a machine.
    """

    half: float = 4e14
    double: float = 2e13
    memory: float = 2.5e12
    near: float = 2e11
    far: float = 2.5e10
    start: float = 5e-5
    machine: int = 8

    def __str__(self) -> str:
        """What is assumed, in words."""
        speeds = f"{self.half / 1e12:.0f} TFLOP/s in bfloat16, {self.double / 1e12:.0f} in float64"
        links = f"{self.near / 1e9:.0f} GB/s within a machine of {self.machine}, {self.far / 1e9:.0f} between machines"
        return f"{speeds}, memory {self.memory / 1e12:.1f} TB/s, {links}"


GPUS = Gpu()


@dataclass(frozen=True)
class Shape:
    """A model and its sites, by the formulas of docs/performance.md.

    Attributes:
        parameters: of all layers, and of those at and above the first site; without embeddings.
        above: see ``parameters``.
        hidden: width of the head's input.
        vocabulary: of the head.
        d_in: of every site.
        d_out: of every site.
        sites: how many.
        tokens: per edit.
        answers: answer tokens per edit.
        nodes: of the quadrature.
    """

    parameters: float
    above: float
    hidden: int
    vocabulary: int
    d_in: int
    d_out: int
    sites: int
    tokens: float
    answers: float
    nodes: int

    def turn(self, edits: int, count: int, gpu: Gpu = GPUS) -> dict[str, float]:
        """Predicted seconds of a turn and of its parts."""
        tokens, n = self.tokens * edits, self.answers * edits
        work = 2 * self.parameters * tokens + 2 * self.above * tokens + 4 * self.hidden * self.vocabulary * n
        # However few tokens a rank has, it reads all weights once.
        floor = 2 * (self.parameters + self.above) / gpu.memory
        capture = max(work / count / gpu.half, floor)
        rate = gpu.near if count <= gpu.machine else gpu.far
        gather = (2 * gpu.start + 4 * n * (self.d_in + self.d_out) * self.sites / rate) if count > 1 else 0.0
        d, rank = self.d_out, min(n, self.d_in)
        one = root_operations(round(n), d, self.nodes) + ridge_operations(round(n), self.d_in, d)
        most = -(-self.sites // count)
        everywhere = self.sites * (2 * n * d * d / gpu.double + 12 * self.d_in * d / gpu.memory)
        sent = 8 * self.sites * (rank * d + (n * n if n < self.d_in else 0))
        send = min(count, self.sites) * gpu.start + sent / rate if count > 1 else 0.0
        algebra = most * one / gpu.double + everywhere
        return {"turn": capture + gather + algebra + send, "capture": capture, "gather": gather, "algebra": algebra, "send": send}  # fmt: skip  # noqa: E501


EIGHT_B = Shape(
    parameters=6.98e9,
    above=7 / 32 * 6.98e9,
    hidden=4096,
    vocabulary=128256,
    d_in=14336,
    d_out=4096,
    sites=7,
    tokens=17.5,
    answers=3.0,
    nodes=10,
)
"""Llama 3 8B, seven ``down_proj`` sites from layer 25 on, edits as in scripts/benchmarks/benchmark_turn.py."""
