"""How a turn's time falls with the number of processes, and what a model of the cost says of more.

    python scripts/benchmarks/benchmark_scaling.py --processes 1 2 4 --repeats 5 --out scaling.json

Each world of processes (gloo, CPU, one thread each) edits a random model with the same turns. Side by side in one run
its rank 0 does a turn alone while the others wait, then all do one together, the algebra divided over them, then one
with all the algebra on every rank. The cost model takes a lone turn's parts and the measured link; what it predicts is
printed beside what was measured, and then for the layers of an 8B model on GPUs, from assumed speeds: nothing of that
part was measured.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing
from benchmark_turn import RIDGE, SHAPES, STEP_SIZE, build, edits
from measuring import machine, quiet
from scaling_model import EIGHT_B, GPUS, Link, Parts, predicted

from stableedit_pl.devices import ranks
from stableedit_pl.devices.division import solve_together
from stableedit_pl.method.problem import Problem, solve_all
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import LNStatistics
from stableedit_pl.model import shared_capture as shares
from stableedit_pl.model.capture import capture
from stableedit_pl.model.closed_form import ClosedFormEdit, EditorState, StepInput
from stableedit_pl.model.micro_batches import by_length
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.shared_capture import capture_together
from stableedit_pl.model.sites import resolve_sites


class Stopwatch:
    """Adds up the time of named parts of a turn."""

    def __init__(self) -> None:
        """Put it where the parts are."""
        self.parts: dict[str, float] = {}
        self.bytes = {"gather": 0, "send": 0}
        shares.capture = self._timed("capture", shares.capture)
        ranks.gather_rows = self._counted("gather", ranks.gather_rows)
        ranks.send_to_all = self._counted("send", ranks.send_to_all)
        LNStatistics.updated = self._timed("moments", LNStatistics.updated)  # type: ignore[method-assign]
        Problem.solve = self._timed("solve", Problem.solve)  # type: ignore[method-assign]
        ClosedFormEdit._commit = self._timed("commit", ClosedFormEdit._commit)  # type: ignore[method-assign]

    def _timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = work(*args, **kwargs)
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - started
            return result

        return timed

    def _counted(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._timed(name, work)

        def counted(tensor: torch.Tensor, *args: Any) -> Any:
            self.bytes[name] += tensor.numel() * tensor.element_size()
            return timed(tensor, *args)

        return counted

    def run(self, turn: Callable[[], None]) -> dict[str, float]:
        """Seconds of one turn, and of its parts."""
        self.parts = {}
        started = time.perf_counter()
        turn()
        return {"turn": time.perf_counter() - started, **self.parts}


def worker(rank: int, world: int, port: int, options: argparse.Namespace, folder: str) -> None:
    """One rank: turns alone (rank 0) and together, alternating; rank 0 writes what was measured."""
    quiet()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model = build(SHAPES[options.shape])
    sites = resolve_sites(model, [SHAPES[options.shape]["sites"]])
    encodings = edits(options.edits, SHAPES[options.shape]["model"]["vocab_size"])
    state = EditorState(LNStatistics.empty(sites, "site"))
    forward = PartialForward.tried(model, sites)
    pieces = by_length([len(encoding.input_ids) for encoding in encodings], options.tokens)
    given: list[StepInput] = []
    optimizer = ClosedFormEdit(sites, state, given.pop)
    watch = Stopwatch()

    def turn(together: bool, divide: Any = "never") -> None:
        optimizer.solve = partial(solve_together, divide=divide) if together else solve_all

        def closure() -> torch.Tensor:
            if together:
                captured = capture_together(forward, sites, encodings, pieces, 0, "token_sum")[0]
            else:
                captured = watch._timed("capture", capture)(forward, sites, encodings, pieces, 0)
            given.append(StepInput(captured, MethodSettings(step_size=STEP_SIZE, ridge=RIDGE), True))
            return captured.measured[0].mean()

        optimizer.step(closure)

    ways: dict[str, Callable[[], None]] = {
        "alone": lambda: turn(False) if rank == 0 else None,
        "divided": lambda: turn(True, "always"),
        "everywhere": lambda: turn(True, "never"),
    }
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            dist.barrier()
            watch.bytes = {"gather": 0, "send": 0}
            measured = watch.run(way)
            dist.barrier()
            everywhere: list[Any] = [None] * world
            dist.all_gather_object(everywhere, measured)
            if repeat:  # the first warms up
                slowest = {part: max(one.get(part, 0.0) for one in everywhere) for part in everywhere[0]}
                times[name].append({**slowest, "gathered": watch.bytes["gather"], "sent": watch.bytes["send"]})
    link = _link()
    if rank == 0:
        rows = sum(len(encoding.target_ids) for encoding in encodings)
        figures = {"times": times, "link": link, "rows": rows, "sites": [(site.d_in, site.d_out) for site in sites]}
        Path(folder, f"{world}.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def _link() -> list[float]:
    """Seconds that a small broadcast takes, and bytes per second of a large one."""
    seconds = []
    for size in (1, 4_000_000):
        tensor = torch.zeros(size)
        taken = []
        for _ in range(5):
            dist.barrier()
            started = time.perf_counter()
            dist.broadcast(tensor, src=0)
            dist.barrier()
            taken.append(time.perf_counter() - started)
        seconds.append(statistics.median(taken))
    return [seconds[0], 16e6 / max(seconds[1] - seconds[0], 1e-9)]


def world_of(count: int, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """What a world of so many processes measured: medians over its repeats."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, (count, port, options, folder), nprocs=count)
    figures: dict[str, Any] = json.loads(Path(folder, f"{count}.json").read_text())
    times = figures["times"]
    medians = {
        name: {part: statistics.median(one.get(part, 0.0) for one in runs) for part in runs[0]}
        for name, runs in times.items()
    }
    ratios = {
        name: sorted(a["turn"] / b["turn"] for a, b in zip(times["alone"], times[name], strict=True)) for name in times
    }
    return {**figures, "medians": medians, "ratios": ratios}


def main() -> int:
    """Measure, model, and hold one against the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--shape", choices=("tiny", "small"), default="small")
    parser.add_argument("--edits", type=int, default=100, help="edits of a turn")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per forward pass")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way")
    parser.add_argument("--out", type=Path, help="where the figures are saved as JSON")
    options = parser.parse_args()
    quiet()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{machine('cpu')} each, {cores} cores; {options.shape}, {options.edits} edits a turn\n")
    print("Measured: seconds of a turn, medians; each part on the rank where it took longest")
    columns = ("turn", "capture", "gather", "moments", "solve", "send", "commit")
    print(f"{'processes':>9}  {'algebra':<11}" + "".join(f"{name:>9}" for name in columns) + "   alone/turn   model")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in options.processes:
            world = world_of(count, options, folder)
            found[str(count)] = world
            alone = world["medians"]["alone"]
            lone = Parts(alone["capture"], alone["moments"], alone["solve"], alone["commit"], len(world["sites"]))
            ways = ("divided", "everywhere") if count > 1 else ("alone",)
            for way in ways:
                line, ratios = world["medians"][way], world["ratios"][way]
                model = predicted(
                    lone, count, cores, Link(*world["link"]), line["gathered"] * count, line["sent"], way == "divided"
                )
                line["model"] = model
                print(
                    f"{count:9}  {way if count > 1 else '-':<11}"
                    + "".join(f"{line.get(name, 0.0):9.3f}" for name in columns)
                    + f"   {statistics.median(ratios):6.2f}"
                    + (f" ({ratios[0]:.2f}-{ratios[-1]:.2f})" if count > 1 else "")
                    + f"   {model:.3f}"
                )
            if count > 1:
                line, (start, rate) = world["medians"]["divided"], world["link"]
                print(
                    f"{'':9}  gathered {line['gathered'] * count / 1e6:.1f} MB, sent {line['sent'] / 1e6:.1f} MB, link "
                    f"{1e3 * start:.1f} ms and {rate / 1e6:.0f} MB/s"
                )
    print("\nPredicted, not measured: a turn of the layers of an 8B model (bfloat16, 7 sites of 14336 x 4096)")
    print(f"assumed: {GPUS}")
    print(f"{'edits':>9}{'GPUs':>6}{'turn s':>9}{'capture':>9}{'gather':>9}{'algebra':>9}{'send':>9}{'edits/s':>9}")
    found["predicted"] = []
    for turn_size in (100, 1000):
        for count in (1, 8, 64):
            row = EIGHT_B.turn(turn_size, count)
            found["predicted"].append({"edits": turn_size, "gpus": count, **row})
            print(
                f"{turn_size:9}{count:6}"
                + "".join(f"{row[part]:9.3f}" for part in ("turn", "capture", "gather", "algebra", "send"))
                + f"{turn_size / row['turn']:9.0f}"
            )
    if options.out:
        options.out.write_text(json.dumps({"machine": machine("cpu"), "cores": cores, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
