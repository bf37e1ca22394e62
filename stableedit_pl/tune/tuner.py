"""``tune``: settings for an editor, found on rows that will not be edited."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from stableedit_pl.data.readers import read_records
from stableedit_pl.data.record_encoding import RecordEncoder
from stableedit_pl.data.records import EditRecord
from stableedit_pl.data.stream import EditStream
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.method.settings import RELATIVE_RIDGE, RELATIVE_STEP
from stableedit_pl.model.micro_batches import Batching
from stableedit_pl.tune.bench import Bench, Protect, Stream
from stableedit_pl.tune.candidates import Candidate, candidates, site_windows
from stableedit_pl.tune.halving import Budget, halve
from stableedit_pl.tune.outcome import Goal, TuneResult

TuneRule = Literal["token_match", "exact_match"]

MOST_EDITS = 50
"""Of a turn: relative settings mean the same for larger ones, which would leave time for half as many candidates."""

MOST_TURNS = 8
"""Of the longest streams: later turns add little to what a search can tell apart."""


def tune(
    editor: LifelongEditor,
    stream: EditStream,
    *,
    rows: str | None = None,
    minutes: float = 10.0,
    trials: int | None = None,
    rule: TuneRule = "token_match",
    floors: Mapping[str, float] | None = None,
    seed: int = 0,
    progress: bool = True,
    protect: Protect | None = None,
) -> TuneResult:
    """Search sites, step, ridge and passes for a model and a kind of rows.

    Short streams of several turns are applied and scored, and the weights put back. The configured settings are tried
    first, with the defaults of relative settings where absolute ones are configured.

    ``exact_match`` scores what a model would write freely by greedy decoding, without decoding.

    Args:
        editor: its model may be loaded already; sites and settings are where the search begins.
        stream: says how rows are read and turned into turns; nothing of ``path`` is edited.
        rows: file of the rows to try on, in the layout of the stream; None: its ``warmup_path``.
        minutes: on the clock, without loading.
        trials: so many settings are tried instead, whatever the clock says.
        rule: of the scores.
        floors: score kind to the least that it may be; settings below come after all others.
        seed: of the order in which settings are tried.
        progress: show a bar.
        protect: finds what updates of sites leave alone, as the run's callback ProtectedDirections does.

    Returns:
        What was found; also after Ctrl-C.

    Raises:
        SettingError: if there are no rows, too few of them, or some that the stream edits.
    """
    goal = Goal(floors or {})
    if minutes <= 0 or (trials is not None and trials < 1):
        raise SettingError(f"tune: minutes must be positive and trials at least 1, got {minutes:g} and {trials}")
    file, records = _rows(stream, rows)
    editor.configure_model()
    encoder = RecordEncoder(editor.encoder(stream.count_bare_space), file)
    encoder.check(records)
    turn_size = min(stream.turn_size, MOST_EDITS, len(records) // 2)
    records = records[: turn_size * MOST_TURNS]
    bench = Bench(
        editor,
        [encoder.scored(record) for record in records],
        turn_size,
        Batching(stream.micro_batch_tokens, stream.micro_batch_size, editor.loss_reduction == "micro_batch_mean"),
        rule,
        protect,
    )
    own_sites = tuple(editor.site_patterns)
    windows = [sites for sites in site_windows(editor.model, editor.hidden_size()) if sites != own_sites]
    settings = editor.settings
    own = Candidate(
        own_sites,
        settings.relative_step or RELATIVE_STEP,
        settings.relative_ridge or RELATIVE_RIDGE,
        settings.passes,
    )
    started = time.perf_counter()
    with _Bar(minutes * 60 if trials is None else None, trials, goal, progress) as bar:
        queue = candidates([own_sites, *windows], own, seed)
        streams = halve(bench, queue, Budget(minutes * 60, trials), goal, bar.show)
    facts = {
        "base_model": editor.base_model,
        "normalization": settings.normalization,
        "rows": str(file),
        "turn_size": turn_size,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return TuneResult(streams, goal, rule, facts)


def _rows(stream: EditStream, given: str | None) -> tuple[Path, list[EditRecord]]:
    """The file of the rows to try on, and its rows."""
    source = given or stream.warmup_path
    if source is None:
        raise SettingError(
            "tune needs rows that will not be edited: set data.warmup_path, or give a file of such rows with --rows"
        )
    file = stream.warmup_file if given is None else Path(given).expanduser()
    records = read_records(stream.dataset, file, on_bad_row=stream.on_bad_row)
    if len(records) < 4:
        raise SettingError(f"tune: {file} has {len(records)} rows; streams of two turns need at least 4")
    edited = {r.prompt for r in read_records(stream.dataset, stream.target_file, on_bad_row=stream.on_bad_row)}
    both = [record for record in records if record.prompt in edited]
    if both:
        raise SettingError(
            f"tune: {len(both)} rows of {file} have prompts that {stream.target_file} edits, the first is row "
            f"{both[0].row} ({both[0].prompt!r}): settings that have seen them would look better than they are. Give "
            "other rows with --rows"
        )
    return file, records


class _Bar:
    """Time left, what is being done, and the best so far."""

    def __init__(self, seconds: float | None, trials: int | None, goal: Goal, shown: bool) -> None:
        self.seconds, self.goal = seconds, goal
        total, unit = (trials, "trial") if seconds is None else (round(seconds), "s")
        self.bar = tqdm(total=total, desc="Tune", unit=unit, disable=not shown, file=sys.stderr, dynamic_ncols=True)
        self.started = time.perf_counter()

    def show(self, doing: str, streams: Sequence[Stream]) -> None:
        """One more stream."""
        ranked = self.goal.ranked(streams)
        best = f"{self.goal.value(ranked[0]):.3f}" if ranked else "-"
        self.bar.set_description(f"Tune: {doing}; {len(streams)} tried, best {best}")
        done = len(streams) if self.seconds is None else int(time.perf_counter() - self.started)
        self.bar.n = min(done, self.bar.total)
        self.bar.refresh()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
