"""A SLURM job that is about to reach its time limit: asked to stop, and put into the queue again."""

import os
import signal
import subprocess

REQUEUE_SIGNAL: signal.Signals | None = getattr(signal, "SIGUSR1", None)
"""What ``#SBATCH --signal=USR1@300`` sends before the end; None where there is no such signal (Windows)."""


def job() -> str | None:
    """The job this process belongs to, as ``scontrol`` takes it; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def requeue() -> str:
    """Put this process's job into the queue again.

    Returns:
        A sentence that says whether SLURM agreed, and what to do if not.
    """
    number = job()
    try:
        done = subprocess.run(
            ["scontrol", "requeue", str(number)], capture_output=True, text=True, timeout=60, check=False
        )
        problem = "" if done.returncode == 0 else (done.stderr.strip() or f"exit code {done.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        return f"SLURM did not requeue job {number} (scontrol: {problem}); submit it again, it goes on from here"
    return f"SLURM has job {number} in its queue again"
