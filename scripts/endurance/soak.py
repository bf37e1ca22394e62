"""A million edits in one run, killed and resumed on the way: throughput, memory, checkpoint times and stability.

    python scripts/endurance/soak.py --edits 1000000 --kills 6

Edits the demo model with a long stream (the demo's rows over and over, each time with other targets) through the
command line, kills the process (SIGKILL) at random instants, and resumes it with ``--ckpt_path last``. Prints one row
per tenth of the stream, and what was checked: one ledger line per edit, ``stableedit verify``, and throughput of the
last tenth within 10% of the first. Saves the picture and the rows beside the run; exits with 1 when a check fails.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # long_stream and measuring serve both

from long_stream import write_retargeted
from soak_watch import FACTS, LOG

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent / "benchmarks"
SITE = "model.layers.1.mlp.down_proj"
METHOD = {"step_size": 1e-4, "ridge": 10.0, "passes": 1}
STABILITY = ("update_norm", "weight_norm_ratio", "cosine_to_previous", "cosine_to_sum")


def write_config(folder: Path, turn_size: int) -> Path:
    """The run's configuration: the demo's settings on the long stream."""
    settings = {
        "seed_everything": 0,
        "run_dir": str(folder / "run"),
        "model": {"base_model": "demo", "model_dtype": "float32", "sites": [SITE], **METHOD},
        "data": {
            "path": str(folder / "stream.jsonl"),
            "warmup_path": "demo",
            "turn_size": turn_size,
            "micro_batch_tokens": 2048,
        },
        "trainer": {
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "WarmUp", "init_args": {"mode": "statistics_only"}},
                # The sample's facts are replaced by later passes; soak_watch scores those that hold at the time.
                {
                    "class_path": "EditEvaluation",
                    "init_args": {"every_n_turns": None, "sample_size": 1, "final": False},
                },
                {"class_path": "StabilityMonitor", "init_args": {"every_n_turns": 10}},
                {"class_path": "soak_watch.CurrentFacts", "init_args": {"every_n_turns": 100}},
                {"class_path": "soak_watch.WatchedCheckpoint", "init_args": {"every_n_turns": 20}},
            ],
        },
    }
    file = folder / "soak.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that are whole; a kill may leave half of one."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def last_turn(file: Path) -> dict[str, Any]:
    """The newest whole line of the log, read from its end."""
    if not file.exists():
        return {"edits": 0}
    with file.open("rb") as log:
        log.seek(max(file.stat().st_size - 2000, 0))
        lines = log.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except json.JSONDecodeError:
            continue
    return {"edits": 0}


def run(folder: Path, config: Path, edits: int, kills: int, chance: random.Random) -> list[int]:
    """Run to the end, killing the process at so many random places.

    Returns:
        How many edits had been applied at each kill.
    """
    places = [int(edits * (i + chance.uniform(0.2, 0.8)) / kills) for i in range(kills)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{BENCHMARKS}"}
    log, happened = folder / "run" / LOG, []
    with tqdm(total=edits, unit="edit", desc="Soak", mininterval=10, smoothing=0) as bar:
        while True:
            resume = ["--ckpt_path=last"] if happened else []
            command = [sys.executable, "-m", "stableedit_pl", "fit", f"--config={config}", *resume]
            with (folder / "output.txt").open("ab") as output:
                process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            while process.poll() is None:
                time.sleep(0.5)
                done = last_turn(log)["edits"]
                bar.update(done - bar.n)
                if places and done >= places[0]:
                    time.sleep(chance.uniform(0, 2))
                    process.kill()
                    process.wait()
                    happened.append(last_turn(log)["edits"])
                    places.pop(0)
                    break
            else:
                if process.returncode != 0:
                    raise SystemExit(f"the run ended with {process.returncode}; see {folder}/output.txt")
                return happened


def curves(run_dir: Path) -> dict[str, dict[int, float]]:
    """The stability curves, by turn."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    names = {f"stability/{name}/{SITE}": name for name in STABILITY} | {
        f"normalization/condition_number/{SITE}": "condition_number"
    }
    return {name: {e.step: e.value for e in events.Scalars(tag)} for tag, name in names.items()}


def mean(values: list[float]) -> float:
    """Their mean; NaN of none."""
    return sum(values) / len(values) if values else float("nan")


def table(turns: list[dict[str, Any]], facts: list[dict[str, Any]], stable: Any, edits: int) -> list[dict[str, float]]:
    """One row per tenth of the stream.

    Args:
        turns: the log, one row per turn.
        facts: scores of the facts that held at the time.
        stable: as from :func:`curves`.
        edits: length of the stream.
    """
    rows = []
    for tenth in range(10):
        low, high = edits * tenth // 10, edits * (tenth + 1) // 10
        own = [t for t in turns if low < t["edits"] <= high and t["seconds"] is not None and t["phase"] == "edit"]
        span = range(own[0]["turn"], own[-1]["turn"] + 1)
        saved = [t["checkpoint_seconds"] for t in own if t["checkpoint_seconds"]]
        plain = sorted(t["seconds"] for t in own if not t["checkpoint_seconds"])
        row = {
            "edits": high,
            "edits_per_second": sum(t["applied"] for t in own) / sum(t["seconds"] for t in own),
            "megabytes": max(t["megabytes"] for t in own),
            "checkpoint_ms": 1000 * mean(saved),
            "turn_ms": 1000 * plain[len(plain) // 2],
        }
        for name, points in stable.items():
            row[name] = mean([value for turn, value in points.items() if turn in span])
        scores = [f for f in facts if f["turn"] in span]
        for kind in ("efficacy", "generalization", "specificity"):
            row[kind] = mean([f[kind] for f in scores])
        rows.append(row)
    return rows


def show(rows: list[dict[str, float]]) -> str:
    """The rows as text."""
    columns = {
        "edits": ("edits", "{:,.0f}"),
        "edits_per_second": ("edits/s", "{:.0f}"),
        "turn_ms": ("turn ms", "{:.0f}"),
        "checkpoint_ms": ("save ms", "{:.0f}"),
        "megabytes": ("MB", "{:.0f}"),
        "efficacy": ("efficacy", "{:.3f}"),
        "generalization": ("general.", "{:.3f}"),
        "specificity": ("specif.", "{:.3f}"),
        "update_norm": ("|update|", "{:.4f}"),
        "weight_norm_ratio": ("|W|/|W0|", "{:.3f}"),
        "cosine_to_previous": ("cos prev", "{:+.3f}"),
        "cosine_to_sum": ("cos sum", "{:+.3f}"),
        "condition_number": ("cond.", "{:.0f}"),
    }
    lines = ["".join(title.rjust(10) for title, _ in columns.values())]
    lines += ["".join(form.format(row[name]).rjust(10) for name, (_, form) in columns.items()) for row in rows]
    return "\n".join(lines)


def plot(turns: list[dict[str, Any]], facts: list[dict[str, Any]], stable: Any, kills: list[int], file: Path) -> None:
    """Four panels over the number of edits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    edits_at = {t["turn"]: t["edits"] for t in turns}
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 6.5), sharex=True, layout="constrained")
    timed = [t for t in turns if t["seconds"] is not None and t["phase"] == "edit"]
    pieces = [timed[i : i + 100] for i in range(0, len(timed), 100)]
    rates = [sum(t["applied"] for t in p) / sum(t["seconds"] for t in p) for p in pieces]
    panels[0, 0].plot([p[-1]["edits"] for p in pieces], rates)
    panels[0, 0].set(title="edits per second, everything included", ylim=(0, None))
    panels[0, 1].plot([t["edits"] for t in turns], [t["megabytes"] for t in turns])
    panels[0, 1].set(title="resident memory, MB", ylim=(0, None))
    for kind in ("efficacy", "generalization", "specificity"):
        panels[1, 0].plot([f["edits"] for f in facts], [f[kind] for f in facts], label=kind)
    panels[1, 0].set(title=f"scores of the {FACTS} facts that hold at the time", ylim=(0, 1.02), xlabel="edits")
    growth, cosines = panels[1, 1], panels[1, 1].twinx()
    growth.plot([edits_at.get(s, 0) for s in stable["weight_norm_ratio"]], list(stable["weight_norm_ratio"].values()))
    growth.set_ylabel("|W| / |W0|")
    for name, color in (("cosine_to_previous", "tab:orange"), ("cosine_to_sum", "tab:green")):
        at = [edits_at.get(s, 0) for s in stable[name]]
        cosines.plot(at, list(stable[name].values()), color=color, label=f"{name} (right)", linewidth=0.6)
    cosines.legend(frameon=False, loc="lower right")
    panels[1, 1].set(title="stability of the edited weight", xlabel="edits")
    for panel in panels.flat:
        for kill in kills:
            panel.axvline(kill, color="0.7", linewidth=0.8, linestyle=":")
    panels[1, 0].legend(frameon=False)
    figure.suptitle("Dotted: the process was killed and resumed", fontsize=9, x=0.99, ha="right")
    figure.savefig(file, dpi=110)


def main() -> int:
    """Run, read what the run wrote, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=1_000_000, help="length of the stream")
    parser.add_argument("--turn_size", type=int, default=100, help="edits per turn")
    parser.add_argument("--kills", type=int, default=6, help="how often the process is killed")
    parser.add_argument("--seed", type=int, default=0, help="draws the instants of the kills")
    parser.add_argument("--folder", type=Path, help="where the run is kept; a temporary folder by default")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    write_retargeted(arguments.edits, folder / "stream.jsonl")
    config = write_config(folder, arguments.turn_size)
    started = time.monotonic()
    kills = run(folder, config, arguments.edits, arguments.kills, random.Random(arguments.seed))
    minutes = (time.monotonic() - started) / 60
    # A resumed run does turns again whose log lines are there already: the last line of a turn counts.
    turns = list({row["turn"]: row for row in rows_of(folder / "run" / LOG)}.values())
    facts = [row for row in turns if "efficacy" in row]
    stable = curves(folder / "run")
    rows = table(turns, facts, stable, arguments.edits)
    (folder / "soak.json").write_text(json.dumps({"rows": rows, "kills": kills, "minutes": minutes}, indent=1))
    plot(turns, facts, stable, kills, folder / "soak.png")
    print(show(rows))
    with (folder / "run" / "edits.jsonl").open() as lines:
        ledger = [row["id"] for row in map(json.loads, lines) if row["phase"] == "edit"]
    verify = [sys.executable, "-m", "stableedit_pl", "verify", f"--run={folder / 'run'}"]
    ratio = rows[-1]["edits_per_second"] / rows[0]["edits_per_second"]
    checks = {
        f"{len(kills)} kills, at {', '.join(f'{k:,}' for k in kills)} edits": len(kills) == arguments.kills,
        "one ledger line per edit, in order": ledger == [str(i) for i in range(arguments.edits)],
        "stableedit verify": subprocess.run(verify, capture_output=True, check=False).returncode == 0,
        f"throughput, last tenth over first: {ratio:.3f}": 0.9 <= ratio <= 1.1,
    }
    print()
    for what, passed in checks.items():
        print(f"{'ok  ' if passed else 'FAIL'} {what}")
    print(f"{minutes:.0f} minutes on one thread of {platform.processor() or platform.machine()}; kept in {folder}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
