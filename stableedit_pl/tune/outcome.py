"""What a search found: the best settings, the front, and the files that tell of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import yaml

from stableedit_pl.errors import SettingError
from stableedit_pl.model.asking import ScoringRule
from stableedit_pl.model.scoring import KINDS, RULES
from stableedit_pl.run.files.directory import write_atomically
from stableedit_pl.tune.bench import Stream


@dataclass(frozen=True)
class Goal:
    """What is searched for: the harmonic mean of all scores that the rows allow, above floors.

    Attributes:
        floors: kind to the least that its score may be.
    """

    floors: Mapping[str, float] = field(default_factory=dict)

    def value(self, stream: Stream) -> float:
        """Between 0 and 1; 0 for a stream that failed."""
        return 0.0 if stream.failed is not None or not stream.scores else harmonic_mean(list(stream.scores.values()))

    def holds(self, stream: Stream) -> bool:
        """Whether a stream is above all floors."""
        return all(stream.scores.get(kind, 1.0) >= floor for kind, floor in self.floors.items())

    def ranked(self, streams: Sequence[Stream]) -> list[Stream]:
        """The best first: longer streams before shorter ones, those above the floors before the rest."""
        return sorted(streams, key=lambda s: (-s.turns, not self.holds(s), -self.value(s)))


@dataclass(frozen=True)
class TuneResult:
    """What :func:`stableedit_pl.tune.tuner.tune` found.

    Attributes:
        streams: all that were tried, in the order in which they were begun.
        goal: what was searched for.
        rule: of the scores.
        facts: rows, seed, model and other circumstances, as files keep them.
    """

    streams: Sequence[Stream]
    goal: Goal
    rule: ScoringRule
    facts: Mapping[str, Any]

    @property
    def best(self) -> Stream:
        """The stream whose settings are suggested.

        Raises:
            SettingError: if nothing was tried, or everything failed.
        """
        whole = [stream for stream in self.goal.ranked(self.streams) if stream.failed is None and stream.scores]
        if not whole:
            why = next((f": {stream.failed}" for stream in self.streams if stream.failed), "")
            raise SettingError(f"tune: no stream of edits came to an end{why}; give it more --minutes, or other rows")
        return whole[0]

    def suggestion(self) -> dict[str, Any]:
        """Arguments for :class:`stableedit_pl.LifelongEditor`."""
        return self.best.candidate.settings()

    def front(self) -> list[Stream]:
        """Streams that no other of the same length is better than in all scores, the longest first."""
        there = [stream for stream in self.goal.ranked(self.streams) if stream.scores and stream.failed is None]
        return [one for one in there if not any(_beats(other, one) for other in there if other.turns >= one.turns)]

    def plot(self) -> Any:
        """Specificity over efficacy and generalization, a point for each stream, as a matplotlib figure.

        Raises:
            ImportError: if matplotlib is not there.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        front = self.front()
        for panel, kind in zip(panels, KINDS[:2], strict=True):
            for stream in self.streams:
                if kind in stream.scores and "specificity" in stream.scores:
                    shade = "tab:blue" if stream in front else "0.7"
                    place = (stream.scores[kind], stream.scores["specificity"])
                    panel.scatter(*place, s=18 * stream.turns, color=shade)
                    if stream is self.best:
                        panel.scatter(*place, s=260, facecolors="none", edgecolors="tab:red")
            panel.set(xlabel=f"{kind} ({self.rule})", xlim=(0, 1), ylim=(0, 1))
        panels[0].set_ylabel("specificity")
        figure.suptitle("Streams that were tried; larger: more turns; blue: the front; circle: suggested")
        return figure

    def table(self) -> str:
        """The front as lines of text."""
        lines = [f"{'':9} turns  {'  '.join(KINDS)}  relative_step  relative_ridge  passes  sites"]
        for stream in self.front():
            scores = "  ".join(f"{stream.scores.get(kind, float('nan')):.3f}".rjust(len(kind)) for kind in KINDS)
            c = stream.candidate
            numbers = f"{c.relative_step:13g}  {c.relative_ridge:14g}  {c.passes:6d}"
            mark = "suggested" if stream is self.best else ""
            lines.append(f"{mark:9} {stream.turns:5d}  {scores}  {numbers}  {', '.join(c.sites)}")
        return "\n".join(lines)

    def write(self, out: Path) -> list[Path]:
        """Write the overlay, ``tune.json`` beside it, and where matplotlib is there ``tune.png``.

        Args:
            out: the overlay, YAML.

        Returns:
            The files.
        """
        out.parent.mkdir(parents=True, exist_ok=True)
        best = self.best
        said = [
            "# Lay over the configuration it was found with. Found by stableedit tune, on rows that are not edited.",
            f"# {best.turns} turns of {self.facts['turn_size']} edits, {self.rule} ({RULES[self.rule]}):",
            *(f"#   {kind} {score:.3f}" for kind, score in best.scores.items()),
            f"# the harmonic mean of {len(best.scores)} scores is {self.goal.value(best):.3f}, the best of "
            f"{len(self.streams)} settings tried",
        ]
        settings = yaml.safe_dump({"model": self.suggestion()}, sort_keys=False)
        write_atomically(out, "\n".join(said) + "\n" + settings)
        everything = {
            "suggestion": self.suggestion(),
            "rule": f"{self.rule}: {RULES[self.rule]}",
            "objective": "harmonic mean of the scores",
            "floors": dict(self.goal.floors),
            **self.facts,
            "tried": [
                {
                    **stream.candidate.settings(),
                    "turns": stream.turns,
                    "scores": stream.scores,
                    "objective": self.goal.value(stream),
                    "on_the_front": stream in self.front(),
                    "seconds": round(stream.seconds, 1),
                    "failed": stream.failed,
                }
                for stream in self.streams
            ],
        }
        figures = out.with_name("tune.json")
        write_atomically(figures, json.dumps(everything, indent=2) + "\n")
        files = [out, figures]
        try:
            picture = out.with_name("tune.png")
            self.plot().savefig(picture, dpi=110)
            files.append(picture)
        except ImportError:
            pass
        return files


def _beats(one: Stream, other: Stream) -> bool:
    pairs = [(one.scores.get(kind, 0.0), other.scores.get(kind, 0.0)) for kind in KINDS]
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
