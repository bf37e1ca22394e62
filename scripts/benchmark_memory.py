"""Resident memory over a long stream of edits to the demo model.

    python scripts/benchmark_memory.py --edits 100000

Repeats the demo's target stream, each time with other targets (those of its rows move on by one), so that every edit is
new. Prints resident memory after every tenth of the stream and the slope of a straight line through all points but the
first two tenths, in which caches fill. Exits with 1 when the slope is 1 MB per 10,000 edits or more.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from stableedit_pl import EditStream, EditTrainer, LifelongEditor
from stableedit_pl.callbacks import EditEvaluation, StabilityMonitor
from stableedit_pl.demo import demo_path


def retargeted(count: int, file: Path) -> None:
    """Write ``count`` edits: the demo's rows over and over, each pass with the next targets of their own question."""
    rows = [json.loads(line) for line in demo_path("edits.jsonl").read_text(encoding="utf-8").splitlines()]
    by_question: dict[str, list[str]] = {}
    for row in rows:
        by_question.setdefault(row["prompt"].replace(row["subject"], "{}"), []).append(row["target"])
    seen: dict[str, int] = {}
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            row = rows[i % len(rows)]
            question = row["prompt"].replace(row["subject"], "{}")
            targets = by_question[question]
            place = seen.get(question, 0)
            seen[question] = place + 1
            target = targets[(place + i // len(rows)) % len(targets)]
            edit = {"id": str(i), "prompt": row["prompt"], "target": target, "subject": row["subject"]}
            out.write(json.dumps(edit) + "\n")


def resident_megabytes() -> float:
    """This process's resident memory, in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Watch(EditEvaluation):
    """Evaluates as always, and notes memory every so many edits."""

    def __init__(self, every: int, **settings: Any) -> None:
        """Note memory after every ``every`` edits; the rest is EditEvaluation's."""
        super().__init__(**settings)
        self.every, self.edits = every, 0
        self.points: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the turn's edits; note memory when due."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        before, self.edits = self.edits, self.edits + len(batch.edits)
        if self.edits // self.every > before // self.every:
            self.points.append((self.edits, resident_megabytes()))
            if len(self.points) % 10 == 0:
                print(f"{self.edits:>9,} edits  {self.points[-1][1]:8.1f} MB", flush=True)


def main() -> int:
    """Run the stream and judge the slope."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=100_000, help="length of the stream")
    parser.add_argument("--turn_size", type=int, default=500, help="edits per turn")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "edits.jsonl"
        retargeted(arguments.edits, stream)
        watch = Watch(max(arguments.edits // 100, 1), every_n_turns=20, sample_size=200, final=False)
        trainer = EditTrainer(
            run_dir=f"{folder}/run",
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[watch, StabilityMonitor(every_n_turns=5)],
        )
        editor = LifelongEditor(
            base_model="demo",
            model_dtype="float32",
            sites=["model.layers.1.mlp.down_proj"],
            step_size=4e-4,
            ridge=10.0,
        )
        turn_size = arguments.turn_size
        trainer.fit(editor, datamodule=EditStream(path=str(stream), turn_size=turn_size, micro_batch_size=100))
    settled = watch.points[len(watch.points) // 5 :]
    x = torch.tensor([edits for edits, _ in settled], dtype=torch.float64)
    y = torch.tensor([megabytes for _, megabytes in settled], dtype=torch.float64)
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()) * 10_000
    print(f"slope {slope:+.3f} MB per 10,000 edits over the last {int(x[-1] - x[0]):,}")
    return 0 if slope < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
