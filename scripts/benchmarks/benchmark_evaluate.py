"""A retained evaluation with and without the reused layers below the first site.

    python scripts/benchmarks/benchmark_evaluate.py --repeats 5 --out evaluate.json

Scores a sample of prompts over and over, as ``EditEvaluation`` does during a run: once running every layer, once with
the kept outputs of the layers below the first site, alternating in one process. Two models: the demo (2 layers, the
first of them below the site) and a random one of 16 layers with sites in the last 4. Checks that the answers are equal.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_turn import build, edits
from measuring import machine, quiet

from stableedit_pl.demo import demo_path
from stableedit_pl.model.asking import Scorer
from stableedit_pl.model.encoding import Encoder, Encoding
from stableedit_pl.model.loading import load_language_model, load_tokenizer
from stableedit_pl.model.lower_outputs import LowerOutputs
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import resolve_sites

DEEP = {
    "model": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16, "vocab_size": 8000},
    "heads": (8, 8),
    "device": "cpu",
    "dtype": torch.float32,
}


def demo() -> tuple[Any, str, list[Encoding]]:
    """The demo model, its site, and 200 of its edits with all prompts that score them."""
    encoder, encodings = Encoder(load_tokenizer("demo")), []
    for line in demo_path("edits.jsonl").read_text(encoding="utf-8").splitlines()[:200]:
        row = json.loads(line)
        pairs = [(row["prompt"], row["target"]), *((text, row["target"]) for text in row["rephrases"])]
        pairs += [(probe["prompt"], probe["target"]) for probe in row["locality"]]
        encodings += [encoder.encode(prompt, target) for prompt, target in pairs]
    return load_language_model("demo", "float32", None), "model.layers.1.mlp.down_proj", encodings


def deep() -> tuple[Any, str, list[Encoding]]:
    """A random model of 16 layers with sites in the last 4, and 200 prompts."""
    return build(DEEP), "model.layers.{12..15}.mlp.down_proj", edits(200, 8000)


def measure(way: PartialForward, encodings: list[Encoding], repeats: int) -> dict[str, Any]:
    """Seconds of each way, alternating, and whether the answers are equal."""
    scorer, lower = Scorer(way, "token_match", 128, 0), LowerOutputs(2000)
    ways: dict[str, Callable[[], Any]] = {
        "every layer": lambda: scorer.answers(encodings),
        "reused": lambda: scorer.answers(encodings, lower),
    }
    answers = {name: ask() for name, ask in ways.items()}  # fills what is kept
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, ask in ways.items():
            started = time.perf_counter()
            answers[name] = ask()
            seconds[name].append(time.perf_counter() - started)
    equal = [a.tokens for a in answers["every layer"]] == [a.tokens for a in answers["reused"]]
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {"seconds": seconds, "ratio": statistics.median(ratios), "equal": equal, "megabytes": lower.bytes / 1e6}


def main() -> int:
    """Measure both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the figures are saved as JSON")
    arguments = parser.parse_args()
    quiet()
    figures: dict[str, Any] = {"machine": machine("cpu")}
    print(machine("cpu"))
    for name, make in (("demo", demo), ("deep", deep)):
        model, pattern, encodings = make()
        way = PartialForward.tried(model.requires_grad_(False), resolve_sites(model, [pattern]))
        result = figures[name] = measure(way, encodings, arguments.repeats)
        layers = model.config.num_hidden_layers
        print(f"{name}: {len(encodings)} prompts, {len(way.lower)} of {layers} layers below the first site")
        for which, values in result["seconds"].items():
            middle = statistics.median(values)
            print(f"{which:>13}  {middle:7.3f} s   from {min(values):.3f} to {max(values):.3f}")
        answers = "equal" if result["equal"] else "DIFFERENT"
        print(f"  {result['ratio']:.2f} times as fast; {result['megabytes']:.1f} MB kept; answers {answers}")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1))
    return 0 if figures["demo"]["equal"] and figures["deep"]["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
