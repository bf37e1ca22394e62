"""One turn of edits, part by part, against the model's own work and against the textbook.

    python scripts/benchmarks/benchmark_turn.py --shape small --repeats 5 --out turn.json

Three ways through the same edits of a random model, side by side in one process, in turns:

* ``turn``: this package: capture, moments, whitening, ridge, commit;
* ``bare``: forward and backward of the same tokens down to the first site, logits at the answer tokens, nothing else;
* ``textbook``: the equations as they stand: weights require gradients, full logits, a ``d_in x d_in`` solve, and one
  eigendecomposition per site and micro-batch of 10.

Prints median and spread of each, and the two ratios. ``--shape 8b`` needs a CUDA device with about 24 GB.

``--passes N`` looks at further passes over a turn's edits instead: what one costs, capture included, against the first.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from measuring import machine, quiet
from transformers import LlamaConfig, LlamaForCausalLM

from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.statistics import LNStatistics
from stableedit_pl.model.capture import Captured, capture
from stableedit_pl.model.closed_form import ClosedFormEdit, EditorState, StepInput
from stableedit_pl.model.encoding import IGNORED, Encoding, collate
from stableedit_pl.model.micro_batches import by_length
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import resolve_sites

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 1000},
        "heads": (4, 2),
        "sites": "model.layers.{2..3}.mlp.down_proj",
        "device": "cpu",
        "dtype": torch.float32,
    },
    "small": {
        "model": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 32000},
        "heads": (16, 16),
        "sites": "model.layers.{2..3}.mlp.down_proj",
        "device": "cpu",
        "dtype": torch.float32,
    },
    "deep": {  # of SmolLM2-135M
        "model": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152},
        "heads": (9, 3),
        "sites": "model.layers.{26..29}.mlp.down_proj",
        "device": "cpu",
        "dtype": torch.float32,
    },
    "8b": {
        "model": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
        "heads": (32, 8),
        "sites": "model.layers.{25..31}.mlp.down_proj",
        "device": "cuda",
        "dtype": torch.bfloat16,
    },
}
STEP_SIZE, RIDGE = 1e-3, 10.0
MICRO_BATCH = 10
FURTHER = {"small": 0.6, "deep": 0.25}
"""Most that a further pass may cost, relative to the first."""


def build(shape: dict[str, Any]) -> Any:
    """A Llama of this shape with random weights."""
    heads, groups = shape["heads"]
    config = LlamaConfig(**shape["model"], num_attention_heads=heads, num_key_value_heads=groups)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape["dtype"])
    with torch.device(shape["device"]):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def edits(count: int, vocabulary: int) -> list[Encoding]:
    """Edits as long as those of question-answering streams: prompts of 8 to 24 tokens, targets of 1 to 5."""
    chance = random.Random(0)
    made = []
    for _ in range(count):
        prompt = [chance.randrange(3, vocabulary) for _ in range(round(chance.triangular(8, 24, 13)))]
        target = [chance.randrange(3, vocabulary) for _ in range(chance.randint(1, 5))]
        made.append(
            Encoding((*prompt, *target[:-1]), (*[IGNORED] * (len(prompt) - 1), *target), prompt_length=len(prompt))
        )
    return made


class Clock:
    """Adds up the time of named parts, waiting for the device at their ends."""

    def __init__(self, device: str) -> None:
        """Of a device."""
        self.cuda = device == "cuda"
        self.parts: dict[str, float] = {}

    def now(self) -> float:
        """The time when everything asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def time(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """``work``, timed under a name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.now()
            result = work(*args, **kwargs)
            self.parts[name] = self.parts.get(name, 0.0) + self.now() - started
            return result

        return timed


class Turn:
    """This package's turn."""

    def __init__(
        self, model: Any, sites: list[Any], encodings: list[Encoding], tokens: int, device: str, passes: int = 1
    ) -> None:
        """Make everything that exists before a turn."""
        self.settings = MethodSettings(step_size=STEP_SIZE, ridge=RIDGE, passes=passes)
        self.sites, self.encodings = sites, encodings
        for site in sites:
            site.use_master(device)
        self.state = EditorState(LNStatistics.empty(sites, "site", {s.name: torch.device(device) for s in sites}))
        self.forward = PartialForward.tried(model, sites)
        self.optimizer = ClosedFormEdit(sites, self.state, self._input)
        self.micro_batches = by_length([len(e.input_ids) for e in encodings], tokens)

    def _input(self) -> StepInput:
        return StepInput(self.captured, self.settings, True, self._again, seconds=self.seconds)

    def _again(self) -> Captured:
        earlier = self.captured.passes
        return capture(self.forward, self.sites, self.encodings, self.micro_batches, 0, earlier=earlier)

    def __call__(self) -> None:
        """One turn."""

        def closure() -> torch.Tensor:
            started = time.perf_counter()
            self.captured = capture(self.forward, self.sites, self.encodings, self.micro_batches, 0)
            self.seconds = time.perf_counter() - started
            return self.captured.measured[0].mean()

        self.optimizer.step(closure)


def bare(turn: Turn) -> None:
    """Forward and backward of the same tokens down to the first site; no keys, no gradients kept."""
    first, model = turn.sites[0], turn.forward.model
    leaves: list[torch.Tensor] = []

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        leaves.append(output.requires_grad_(True))

    handle = first.module.register_forward_hook(hook)
    with torch.enable_grad():
        for members in turn.micro_batches:
            leaves.clear()
            batch = collate([turn.encodings[i] for i in members], 0, turn.forward.device)
            hidden = model.model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
            answers = batch.on(hidden.device)
            loss = F.cross_entropy(model.lm_head(hidden[answers]).float(), batch.labels[answers], reduction="sum")
            torch.autograd.grad(loss, leaves)
    handle.remove()


class Textbook:
    """The equations as they stand, in float32."""

    def __init__(self, turn: Turn) -> None:
        """Start from no statistics."""
        self.turn = turn
        self.moments: dict[str, list[Any]] = {}

    def __call__(self) -> None:
        """One turn: weights require gradients, full logits, one eigendecomposition per site and micro-batch."""
        model, sites = self.turn.forward.model, self.turn.sites
        rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {site.name: [] for site in sites}
        for site in sites:
            site.module.weight.requires_grad_(True)
        order = sorted(self.turn.encodings, key=lambda e: -len(e.input_ids))
        for start in range(0, len(order), MICRO_BATCH):
            batch = collate(order[start : start + MICRO_BATCH], 0, self.turn.forward.device)
            seen: dict[str, Any] = {}
            handles = []
            for site in sites:

                def hook(_m: Any, inputs: Any, output: torch.Tensor, name: str = site.name, seen: Any = seen) -> None:
                    output.retain_grad()
                    seen[name] = (inputs[0].detach(), output)

                handles.append(site.module.register_forward_hook(hook))
            logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
            F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=IGNORED).backward()
            for handle in handles:
                handle.remove()
            for site in sites:
                inputs, output = seen[site.name]
                rows[site.name].append((inputs[batch.answers].float(), output.grad[batch.answers].float()))
                site.module.weight.grad = None
        for site in sites:
            site.module.weight.requires_grad_(False)
            self._solve(site, rows[site.name])

    def _solve(self, site: Any, pieces: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        device = pieces[0][0].device
        d_in, d_out = site.d_in, site.d_out
        if site.name not in self.moments:
            empty = [torch.zeros(d_in, device=device), torch.zeros(d_in, device=device)]
            self.moments[site.name] = [
                0,
                *empty,
                torch.zeros(d_out, device=device),
                torch.zeros(d_out, d_out).to(device),
            ]
        state = self.moments[site.name]
        for keys, gradients in pieces:
            n, m = state[0], keys.shape[0]
            weight = n * m / (n + m)
            for mean, scatter, batch in ((1, 2, keys), (3, 4, gradients)):
                centre = batch.mean(dim=0)
                centred, shift = batch - centre, centre - state[mean]
                if scatter == 2:
                    state[scatter] = state[scatter] + centred.square().sum(dim=0) + weight * shift.square()
                else:
                    state[scatter] = state[scatter] + centred.T @ centred + weight * torch.outer(shift, shift)
                state[mean] = state[mean] + m / (n + m) * shift
            state[0] = n + m
        gram = torch.zeros(d_in, d_in, device=device)
        cross = torch.zeros(d_in, d_out, device=device)
        n, eye = state[0], torch.eye(d_out, device=device)
        for keys, gradients in pieces:
            sigma = (state[4] + state[4].trace() / n * eye) / (n + d_out)
            values, vectors = torch.linalg.eigh(sigma)
            root = (vectors * values.clamp(min=1e-12).rsqrt()) @ vectors.T
            normal = (keys - state[1]) / ((state[2] / (n - 1)).sqrt() + 1e-7)
            targets = -STEP_SIZE * normal.square().sum(dim=1, keepdim=True) * ((gradients - state[3]) @ root)
            gram += keys.T @ keys
            cross += keys.T @ targets
        delta = torch.linalg.solve(gram + RIDGE * torch.eye(d_in, device=device), cross)
        with torch.no_grad():
            site.module.weight += delta.T.to(site.module.weight.dtype)


def parted(turn: Turn, clock: Clock) -> dict[str, float]:
    """Seconds of one turn by part, each waited for: a separate pass, since waiting costs overlap."""
    from stableedit_pl.method import problem as method
    from stableedit_pl.method.statistics import LNStatistics as Statistics

    real = (Statistics.updated, method.normalize, method.ridge_update, ClosedFormEdit._commit)
    global capture
    captured = capture
    Statistics.updated = clock.time("moments", Statistics.updated)  # type: ignore[method-assign]
    method.normalize = clock.time("whitening", method.normalize)
    method.ridge_update = clock.time("ridge", method.ridge_update)
    ClosedFormEdit._commit = clock.time("commit", ClosedFormEdit._commit)  # type: ignore[method-assign]
    capture = clock.time("capture", capture)
    started = clock.now()
    turn()
    total = clock.now() - started
    Statistics.updated, method.normalize, method.ridge_update, ClosedFormEdit._commit = real  # type: ignore[method-assign]
    capture = captured
    return {**clock.parts, "rest": total - sum(clock.parts.values())}


def further_passes(turn: Turn, shape: str, repeats: int) -> int:
    """What a further pass costs against the first of its turn; the process's exit status."""
    ratios, firsts, others = [], [], []
    for _ in range(repeats):
        turn()
        assert turn.optimizer.last is not None
        first, *further = (done.seconds for done in turn.optimizer.last.passes)
        firsts.append(first)
        others.append(statistics.mean(further))
        ratios.append(others[-1] / first)
    print(f"first pass       {statistics.median(firsts):8.3f} s   from {min(firsts):.3f} to {max(firsts):.3f}")
    print(f"a further pass   {statistics.median(others):8.3f} s   from {min(others):.3f} to {max(others):.3f}")
    ratio = statistics.median(ratios)
    print(f"further / first  {ratio:.3f}")
    bar = FURTHER.get(shape)
    if bar is not None:
        print(f"bar: further / first <= {bar}: {'met' if ratio <= bar else 'MISSED'}")
    return int(bar is not None and ratio > bar)


def plot(parts: dict[str, float], bare_seconds: float, textbook_seconds: float, title: str, file: Path) -> None:
    """Where a turn's time goes, beside the two others."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(10, 2.6), layout="constrained")
    left = 0.0
    for name, seconds in parts.items():
        panel.barh("turn", seconds, left=left, label=f"{name} {seconds:.2f} s")
        left += seconds
    panel.barh("bare forward\nand backward", bare_seconds, color="0.75")
    panel.barh("textbook", textbook_seconds, color="0.6")
    panel.invert_yaxis()
    panel.set(xlabel="seconds", title=title)
    panel.legend(frameon=False, loc="center right")
    figure.savefig(file, dpi=110)


def main() -> int:
    """Measure and judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--edits", type=int, default=100, help="edits of the turn")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens per forward pass")
    parser.add_argument("--passes", type=int, default=1, help="more than one: what further passes cost")
    parser.add_argument("--out", type=Path, help="where the figures are saved as JSON")
    parser.add_argument("--plot", type=Path, help="where a picture of them is saved")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    device = shape["device"]
    if device == "cuda" and not torch.cuda.is_available():
        print(f"shape {arguments.shape} needs a CUDA device, and there is none here")
        return 2
    quiet()
    model = build(shape)
    sites = resolve_sites(model, [shape["sites"]])
    encodings = edits(arguments.edits, shape["model"]["vocab_size"])
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    turn = Turn(model, sites, encodings, arguments.tokens, device, arguments.passes)
    if arguments.passes > 1:
        print(f"{arguments.shape}, {len(encodings)} edits, {arguments.passes} passes: {machine(device)}")
        turn()
        return further_passes(turn, arguments.shape, arguments.repeats)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    textbook = Textbook(turn)
    ways: dict[str, Callable[[], None]] = {"turn": turn, "bare": lambda: bare(turn), "textbook": textbook}
    clock = Clock(device)
    turn()
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    for way in ("bare", "textbook"):
        ways[way]()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats):
        for place in range(len(ways)):
            # Each way follows each of the others: what one leaves behind (caches, freed memory) tells on the next.
            name = list(ways)[(repeat + place) % len(ways)]
            started = clock.now()
            ways[name]()
            times[name].append(clock.now() - started)
    parts = parted(turn, clock)
    padded = sum(len(m) * max(len(encodings[i].input_ids) for i in m) for m in turn.micro_batches)
    real = sum(len(encoding.input_ids) for encoding in encodings)
    rows = sum(len(encoding.target_ids) for encoding in encodings)
    print(f"{arguments.shape}: {machine(device)}")
    print(
        f"{len(encodings)} edits, {real} tokens (+{(padded - real) / real:.1%} padding) in {len(turn.micro_batches)} "
        f"passes, {rows} answer tokens, {len(sites)} sites {sites[0].d_in} -> {sites[0].d_out}"
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:>9}  {medians[name]:8.3f} s   from {min(values):.3f} to {max(values):.3f}")
    print("of which  " + "   ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items()))
    pairs = list(zip(times["turn"], times["bare"], times["textbook"], strict=True))
    over_bare = statistics.median(t / b for t, b, _ in pairs)
    under_textbook = statistics.median(book / t for t, _, book in pairs)
    print(f"turn / bare      {over_bare:.3f}")
    print(f"textbook / turn  {under_textbook:.2f}")
    if peak is not None:
        print(f"peak beyond the loaded model  {peak / 2**30:.2f} GiB")
    if arguments.plot:
        title = f"One turn, shape {arguments.shape}: {machine(device)}"
        plot(parts, medians["bare"], medians["textbook"], title, arguments.plot)
    if arguments.out:
        figures = {
            "shape": arguments.shape,
            "machine": machine(device),
            "seconds": times,
            "parts": parts,
            "turn_over_bare": over_bare,
            "textbook_over_turn": under_textbook,
            "peak_bytes": peak,
        }
        arguments.out.write_text(json.dumps(figures, indent=1))
    bars = {"small": (1.15, 2.5), "8b": (1.25, 15.0)}.get(arguments.shape)
    if bars is None:
        return 0
    met = over_bare <= bars[0] and under_textbook >= bars[1]
    if arguments.shape == "8b":
        met = met and medians["turn"] < 0.6
    print(f"bars: turn / bare <= {bars[0]}, textbook / turn >= {bars[1]}: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
