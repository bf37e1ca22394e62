"""Compare whiten, standardize and none on the demo, each at its own best step size on one grid.

    python scripts/demo/compare_normalizations.py --out docs/normalizations.md

Every run is the shipped demo (configs/demo.yaml) with one pass a turn, an absolute ridge and step, and the
normalization changed. The best step
size is the one with the largest sum of retained efficacy, generalization and specificity.
"""

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from stableedit_pl import EditStream, EditTrainer, LifelongEditor
from stableedit_pl.callbacks import EditEvaluation, WarmUp
from stableedit_pl.model.scoring import KINDS

ROOT = Path(__file__).parents[2]
GRID = [float(f"{10 ** (exponent / 4):.2g}") for exponent in range(-16, 1)]  # quarter decades, 1e-4 to 1
PAPER = {"passes": 1, "ridge": 10.0}
METHODS = ("whiten", "standardize", "none")


def run(config: dict[str, Any], normalization: str, step_size: float) -> dict[str, float]:
    """Retained scores of the demo with one normalization and step size; all zero where the numbers blew up."""
    warm_up = next(c["init_args"] for c in config["trainer"]["callbacks"] if c["class_path"] == "WarmUp")
    with tempfile.TemporaryDirectory() as folder:
        editor = LifelongEditor(**{**config["model"], **PAPER, "normalization": normalization, "step_size": step_size})
        trainer = EditTrainer(
            run_dir=folder,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            callbacks=[WarmUp(**warm_up), EditEvaluation(every_n_turns=None)],
        )
        try:
            trainer.fit(editor, datamodule=EditStream(**config["data"]))
        except ArithmeticError as error:
            print(f"  {normalization} at {step_size:g}: stopped, {error}")
            return dict.fromkeys(KINDS, 0.0)
        found = json.loads((Path(folder) / "results.json").read_text())
        return {kind: found["retained"][kind] for kind in KINDS}


def table(scores: dict[tuple[str, float], dict[str, float]]) -> str:
    """The comparison in Markdown: the best of each method, then the whole grid."""

    def total(key: tuple[str, float]) -> float:
        return sum(scores[key].values())

    lines = [
        "| normalization | best step size | efficacy | generalization | specificity | sum |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        best = max((key for key in scores if key[0] == method), key=total)
        cells = " | ".join(f"{scores[best][kind]:.3f}" for kind in KINDS)
        lines.append(f"| {method} | {best[1]:g} | {cells} | {total(best):.3f} |")
    lines += ["", "The whole grid (efficacy / generalization / specificity):", ""]
    lines += ["| step size | " + " | ".join(METHODS) + " |", "|---" * (len(METHODS) + 1) + "|"]
    for step in sorted({step for _, step in scores}):
        cells = [" / ".join(f"{scores[method, step][kind]:.2f}" for kind in KINDS) for method in METHODS]
        lines.append(f"| {step:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the grid and write the table between the markers of the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="page whose table is replaced; only printed without it")
    parser.add_argument("--steps", type=float, nargs="+", default=GRID, help="the grid of step sizes")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    config = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    scores = {}
    for method in METHODS:
        for step in arguments.steps:
            scores[method, step] = run(config, method, step)
            print(
                f"{method:12} {step:8g}  " + "  ".join(f"{k} {v:.3f}" for k, v in scores[method, step].items()),
                flush=True,
            )
    text = table(scores)
    print(text)
    if arguments.out:
        page = arguments.out.read_text()
        head, _, rest = page.partition("<!-- table -->\n")
        _, _, tail = rest.partition("<!-- end of table -->")
        arguments.out.write_text(f"{head}<!-- table -->\n{text}<!-- end of table -->{tail}")


if __name__ == "__main__":
    main()
