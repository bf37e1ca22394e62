"""Prove resume by force: stop edit runs at random instants, resume them, and compare with runs never stopped.

    python scripts/endurance/chaos.py --kills 200 --seed 0

Runs the demo model on short streams in several variants (warm-up at the start or inside the stream, worker processes,
bfloat16, a turn that is skipped). Each trial is stopped a few times: by SIGKILL mostly, else by SIGTERM, Ctrl-C or an
exception, inside capture, planning, the commit, evaluation, the writing of a checkpoint, or start-up. When it ends, its
weights, moments, position, ledger, results (timings aside) and TensorBoard curves must equal those of the run that was
never stopped. Exits with 1 on any difference.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tqdm import tqdm

import stableedit_pl.callbacks.edit_evaluation as evaluation
import stableedit_pl.callbacks.turn_checkpoint as saving
from stableedit_pl import editor
from stableedit_pl.cli import command as cli
from stableedit_pl.method import problem as method
from stableedit_pl.model import capture, editable_model
from stableedit_pl.model.sites import Site
from stableedit_pl.run.files import checkpoint_io
from stableedit_pl.run.files.checkpoint_io import read_checkpoint
from stableedit_pl.run.files.directory import RunDirectory

POINTS = ("capture", "planning", "commit", "evaluation", "checkpoint", "start-up")
EXIT_CODES = {"SIGTERM": 143, "SIGINT": 130, "exception": 70}

COMMON = """
model: {base_model: demo, model_dtype: float32, sites: [model.layers.1.mlp.down_proj], step_size: 4.0e-4, ridge: 10.0}
data: {path: demo, warmup_path: demo, max_edits: 95, turn_size: 10, micro_batch_size: 4}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
    - {class_path: WarmUp, init_args: {mode: statistics_only, turns: 3}}
    - {class_path: EditEvaluation, init_args: {every_n_turns: 3, sample_size: 20}}
    - {class_path: StabilityMonitor}
    - {class_path: TurnCheckpoint, init_args: {every_n_turns: 2}}
"""
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "warm-up by edits, inside": [],
    "loader processes": ["--data.num_workers=1"],
    "bfloat16": ["--model.model_dtype=bfloat16"],
    "skipped turns": ["--model.bad_turns=skip", "--model.max_update_norm=1.02"],
}
TURNS = 13


def strike(how: str) -> None:
    """Stop this process."""
    if how == "exception":
        raise RuntimeError("injected by chaos.py")
    os.kill(os.getpid(), getattr(signal, how))


def arm(point: str, turn: int, how: str, call: int = 0) -> None:
    """Have this process struck once.

    Args:
        point: one of ``POINTS``.
        turn: at which turn (0-based); the first evaluation, or writing of a checkpoint, from that turn on.
        how: ``SIGKILL``, ``SIGTERM``, ``SIGINT`` or ``exception``.
        call: which of a point's places, where it has several.
    """
    now = {"turn": -1, "struck": False}

    def at(owner: Any, name: str, after: bool = False, reached: Callable[[], bool] = lambda: True) -> None:
        real = getattr(owner, name)

        def struck(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs) if after else None
            if not now["struck"] and reached():
                now["struck"] = True
                strike(how)
            return result if after else real(*args, **kwargs)

        setattr(owner, name, struck)

    real_step = editor.LifelongEditor.training_step

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        now["turn"] = batch.index
        return real_step(self, batch, batch_idx)

    editor.LifelongEditor.training_step = training_step  # type: ignore[method-assign]
    here, from_here = (lambda: now["turn"] == turn), (lambda: now["turn"] >= turn)
    if point == "capture":
        at(capture, "answer_loss", reached=here)
    elif point == "planning":
        at(method, ("ridge_update", "normalize")[call % 2], reached=here)
    elif point == "commit":
        at(Site, "add", after=True, reached=here)
    elif point == "evaluation":
        at(evaluation, "score_base_and_retained") if call % 3 == 0 else at(
            evaluation.EditEvaluation, "_score_sample", after=call % 3 == 1, reached=from_here
        )
    elif point == "checkpoint":
        places: list[tuple[Any, str, bool]] = [
            *((checkpoint_io, "seal", after) for after in (False, True)),
            *((checkpoint_io, "flush_to_disk", after) for after in (False, True)),
            (checkpoint_io, "flush_directory", False),
            *((saving, "_point", after) for after in (False, True)),
        ]
        owner, name, after = places[call % len(places)]
        at(owner, name, after, reached=from_here)
    else:
        owner, name = (
            (editable_model, "load_language_model"),
            (editor.LifelongEditor, "configure_optimizers"),
            (editor.LifelongEditor, "on_fit_start"),
            (evaluation.EditEvaluation, "on_train_start"),
        )[call % 4]
        at(owner, name, after=call % 8 >= 4)


def in_a_process(arguments: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the command line in a forked process; its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.argv = ["stableedit"]
            torch.set_num_threads(1)
            prepare()
            cli.main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = EXIT_CODES["exception"]
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(run: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on having been stopped."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = RunDirectory(run)
    checkpoint = read_checkpoint(directory.last_checkpoint)
    results = json.loads(directory.results.read_text())
    results.pop("seconds")
    monitor = checkpoint["callbacks"]["EditEvaluation"]
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("cost/")]
    rejected = directory.rejected
    return {
        "weights": {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")},
        "moments": {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("statistics/")},
        "position": (
            checkpoint["global_step"],
            checkpoint["stableedit"],
            checkpoint["loops"]["fit_loop"]["state_dict"],
        ),
        "scores so far": {k: v for k, v in monitor.items() if not k.endswith("_seconds")},
        "edits.jsonl": directory.ledger.read_text(),
        "rejected.jsonl": rejected.read_text() if rejected.exists() else "",
        "results.json": results,
        "curves": {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags},
    }


def same(a: Any, b: Any) -> bool:
    """Equality in depth, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def command(run: Path, config: Path, variant: str) -> list[str]:
    """The arguments that start a variant's run."""
    return ["fit", f"--config={config}", f"--run_dir={run}", *VARIANTS[variant]]


def write_config(folder: Path, variant: str) -> Path:
    """The configuration of a variant."""
    text = COMMON
    if variant == "warm-up by edits, inside":
        text = COMMON.replace("mode: statistics_only, turns: 3", "mode: edit, turns: 3, position: middle")
    file = folder / f"{variant.replace(' ', '-').replace(',', '')}.yaml"
    file.write_text(text)
    return file


def trial(
    run: Path, config: Path, variant: str, stops: int, chance: random.Random, seen: Counter[tuple[str, str]]
) -> str:
    """Start a run, stop it so many times, resume it until it ends.

    Returns:
        What went wrong on the way; empty when nothing did.
    """
    start, log = command(run, config, variant), run.parent / f"{run.name}.log"
    directory, stopped = RunDirectory(run), 0
    while True:
        newest = next(iter(directory.turn_checkpoints()), None)
        done = 0 if newest is None else int(newest.stem.partition("=")[2])
        resume = ["--ckpt_path=last"] if newest is not None else ["--overwrite=true"]
        if stopped == stops:
            code = in_a_process([*start, *resume], log)
            return "" if code == 0 else f"exit code {code} when left alone; see {log}"
        point = chance.choice(POINTS)
        how = chance.choices(["SIGKILL", "SIGTERM", "SIGINT", "exception"], [7, 1, 1, 1])[0]
        if point == "start-up" or how == "exception":
            how = "SIGKILL" if point == "start-up" else how
        turn, call = chance.randint(min(done, TURNS - 1), TURNS - 1), chance.randrange(1000)
        code = in_a_process([*start, *resume], log, lambda: arm(point, turn, how, call))  # noqa: B023  (runs at once)
        if code == 0:
            if not directory.results.exists():
                return f"ended without results at {point}; see {log}"
            stops = stopped  # the point was never reached: the run is over, and is compared as it is
            continue
        expected = -signal.SIGKILL if how == "SIGKILL" else EXIT_CODES[how]
        if code not in (expected, 1 if how == "exception" else expected):
            return f"exit code {code} instead of {expected} at {point} by {how}; see {log}"
        stopped += 1
        seen[point, how] += 1


def main() -> int:
    """Run trials until so many stops have happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="stops in all")
    parser.add_argument("--seed", type=int, default=0, help="draws points, turns and signals")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; a temporary folder by default")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    chance, seen, failures, started = random.Random(arguments.seed), Counter[tuple[str, str]](), [], time.monotonic()
    expected, configs = {}, {}
    for number, variant in enumerate(VARIANTS):
        configs[variant] = write_config(folder, variant)
        run = folder / f"reference-{number}"
        code = in_a_process(command(run, configs[variant], variant), folder / f"{run.name}.log")
        if code != 0:
            print(f"the reference run of {variant!r} failed with {code}; see {folder}/{run.name}.log")
            return 1
        expected[variant] = outcome(run)
    trials = 0
    with tqdm(total=arguments.kills, unit="kill", desc="Chaos") as bar:
        while (left := arguments.kills - seen.total()) > 0:
            variant = list(VARIANTS)[trials % len(VARIANTS)]
            run, before = folder / f"trial-{trials}", seen.total()
            problem = trial(run, configs[variant], variant, min(left, chance.randint(1, 6)), chance, seen)
            if not problem:
                found = outcome(run)
                different = [name for name in found if not same(found[name], expected[variant][name])]
                problem = f"differs in {', '.join(different)}" if different else ""
            if problem:
                failures.append(f"trial {trials} ({variant}): {problem}")
                bar.write(failures[-1])
            trials += 1
            bar.update(seen.total() - before)
    hows = ["SIGKILL", "SIGTERM", "SIGINT", "exception"]
    print("\n" + "point".ljust(12) + "".join(how.rjust(11) for how in hows))
    for point in POINTS:
        print(point.ljust(12) + "".join(str(seen[point, how]).rjust(11) for how in hows))
    minutes = (time.monotonic() - started) / 60
    print(f"\n{seen.total()} stops in {trials} trials, {len(failures)} failures, {minutes:.1f} minutes")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
