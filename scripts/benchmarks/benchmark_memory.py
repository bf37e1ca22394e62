"""Resident memory over a long stream of edits to the demo model.

    python scripts/benchmarks/benchmark_memory.py --edits 100000

Repeats the demo's target stream, lap by lap with other targets, so that every edit is
new. Prints resident memory after every tenth of the stream and the slope of a straight line through all points but the
first two tenths, in which caches fill. Exits with 1 when the slope is 1 MB per 10,000 edits or more.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from long_stream import write_retargeted
from measuring import quiet, resident_megabytes, slope

from stableedit_pl import EditStream, EditTrainer, LifelongEditor
from stableedit_pl.callbacks import EditEvaluation, StabilityMonitor, TurnCheckpoint


class Watch(Callback):
    """Notes memory every so many edits, when the turn's checkpoint has been written."""

    def __init__(self, every: int) -> None:
        """Note memory after every ``every`` edits."""
        self.every, self.edits = every, 0
        self.points: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Note memory when due; checkpoints are the last thing of the turn before."""
        if self.edits and self.edits % self.every == 0:
            self.points.append((self.edits, resident_megabytes()))
            if len(self.points) % 10 == 0:
                print(f"{self.edits:>9,} edits  {self.points[-1][1]:8.1f} MB", flush=True)
        self.edits += len(batch.edits)


def main() -> int:
    """Run the stream and judge the slope."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=100_000, help="length of the stream")
    parser.add_argument("--turn_size", type=int, default=500, help="edits per turn")
    arguments = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "edits.jsonl"
        write_retargeted(arguments.edits, stream)
        turn_size = arguments.turn_size
        watch = Watch(-(-arguments.edits // (100 * turn_size)) * turn_size)
        trainer = EditTrainer(
            run_dir=f"{folder}/run",
            accelerator="cpu",
            enable_progress_bar=False,
            callbacks=[
                watch,
                EditEvaluation(every_n_turns=20, sample_size=200, final=False),
                StabilityMonitor(every_n_turns=5),
                TurnCheckpoint(every_n_turns=2),
            ],
        )
        editor = LifelongEditor(
            base_model="demo",
            model_dtype="float32",
            sites=["model.layers.1.mlp.down_proj"],
            step_size=4e-4,
            ridge=10.0,
            passes=1,
        )
        trainer.fit(editor, datamodule=EditStream(path=str(stream), turn_size=turn_size, micro_batch_tokens=2048))
    settled = watch.points[len(watch.points) // 5 :]
    per_10_000 = slope(settled) * 10_000
    print(f"slope {per_10_000:+.3f} MB per 10,000 edits over the last {settled[-1][0] - settled[0][0]:,}")
    return 0 if per_10_000 < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
