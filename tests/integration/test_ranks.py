"""Several processes share each turn: the same run, to rounding, as one process, and one that stops as a whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from edit_runs import PASSES, assert_same_state, results, saved_state
from rank_runs import (
    FINAL_SCORES,
    ROOT,
    STRUCK,
    alone,
    arguments,
    assert_same_run,
    ddp,
    environment,
    free_port,
    rank_settings,
    together,
    weights_at,
)
from tiny import LLAMA_SITE

from stableedit_pl.run.files.checkpoint_file import read_checkpoint


def saved_guards(run: Path) -> dict[str, Any]:
    return read_checkpoint(run / "checkpoints/last.ckpt")["stableedit"]["guards"]


@pytest.fixture
def config(tmp_path: Path, llama_folder: str, warmup_file: str) -> Path:
    """Two sites, each solved at one rank."""
    sites = ["model.layers.0.mlp.down_proj", LLAMA_SITE]
    model = {
        "base_model": llama_folder,
        "sites": sites,
        "step_size": 1e-3,
        "passes": PASSES,
        "divide_algebra": "always",
    }
    settings = rank_settings(model, tmp_path / "edits.jsonl", warmup_file)
    settings["trainer"]["rank_timeout"] = 60
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_protected_directions_are_one_processs(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the algebra would be divided: every rank solves all sites, whose left factors are not the keys."""
    protected = "--trainer.callbacks+=ProtectedDirections"
    alone(monkeypatch, arguments(config, tmp_path / "one", protected))
    done = together(arguments(config, tmp_path / "two", protected, *ddp(2)))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one", weights_at(tmp_path / "one", 0))
    assert saved_guards(tmp_path / "two").keys() == saved_guards(tmp_path / "one").keys() != set()


@pytest.mark.parametrize("normalization", ["whiten", "standardize", "none"])
def test_two_processes_end_where_one_does(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, normalization: str
) -> None:
    method = f"--model.normalization={normalization}"
    alone(monkeypatch, arguments(config, tmp_path / "one", method))
    done = together(arguments(config, tmp_path / "two", method, *ddp(2)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("retained") == 1, "rank 0 alone shows the scores"
    assert_same_run(tmp_path / "two", tmp_path / "one", weights_at(tmp_path / "one", 0))
    assert results(tmp_path / "two")["settings"]["processes"] == 2


@pytest.mark.parametrize(
    "settings",
    [{"device_map": {"": "cpu"}}, {"device_map": "auto", "editor_device": "spread"}, {"device_map": "cpu"}],
    ids=str,
)
def test_two_placed_replicas_end_where_one_whole_model_does(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Each process loads its replica through a device map of its own devices; on the CPU that is the host for both."""
    alone(monkeypatch, arguments(config, tmp_path / "one"))
    placement = tmp_path / "placement.yaml"
    callback = {"class_path": "DevicePlacement", "init_args": settings}
    placement.write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}))
    done = together(arguments(config, tmp_path / "two", f"--config={placement}", *ddp(2)))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "two", tmp_path / "one", weights_at(tmp_path / "one", 0))
    assert results(tmp_path / "two")["settings"]["processes"] == 2


def test_a_placement_that_one_rank_refuses_stops_both(tmp_path: Path, config: Path) -> None:
    """Said once by each, before any model is loaded, and no run directory is left half begun."""
    given = ["--trainer.callbacks+=DevicePlacement", "--trainer.callbacks.turn_rows=1000000000"]
    stopped = together(arguments(config, tmp_path / "run", *given, *ddp(2)))
    assert stopped.returncode == 1, stopped.stderr
    assert "There is no room for the editor's state of 2 sites (1000000000 answer tokens a turn" in stopped.stderr
    assert "Traceback" not in stopped.stderr and "Loading weights" not in stopped.stderr


def test_four_processes_and_whole_micro_batches(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss averaged over micro-batches: three a turn, so that a rank of four has none."""
    method = "--model.loss_reduction=micro_batch_mean"
    alone(monkeypatch, arguments(config, tmp_path / "one", method))
    done = together(arguments(config, tmp_path / "four", method, *ddp(4)))
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "four", tmp_path / "one", weights_at(tmp_path / "one", 0))


def test_a_killed_rank_stops_all_and_any_number_goes_on(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "struck.py"
    script.write_text(STRUCK)
    run, whole = tmp_path / "run", tmp_path / "whole"
    alone(monkeypatch, arguments(config, whole))
    stopped = together(arguments(config, run, *ddp(2)), script, STRUCK_RANK="1", STRUCK_TURN="3", STRUCK_HOW="SIGKILL")
    assert stopped.returncode == 1, stopped.stderr
    assert "Rank 1 is lost" in stopped.stderr and "--ckpt_path last" in stopped.stderr
    # Of one rank alone asked to stop, both stop at the same boundary; the same count then goes on bit for bit.
    stopped = together(
        arguments(config, run, *ddp(2), "--ckpt_path=last"),
        script,
        STRUCK_RANK="1",
        STRUCK_TURN="4",
        STRUCK_HOW="SIGTERM",
    )
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr.count("Stopped by SIGTERM after turn 5") == 1
    alone(monkeypatch, arguments(config, run, "--ckpt_path=last"))
    assert_same_run(run, whole, weights_at(whole, 0))


def test_the_same_count_resumes_bit_for_bit_and_a_lost_rank_0_is_named(tmp_path: Path, config: Path) -> None:
    script = tmp_path / "struck.py"
    script.write_text(STRUCK)
    whole, run = tmp_path / "whole", tmp_path / "run"
    # Solved by every rank for itself, or one site at each of them: the same bytes.
    assert together(arguments(config, whole, *ddp(2), "--model.divide_algebra=never")).returncode == 0
    stopped = together(arguments(config, run, *ddp(2)), script, STRUCK_RANK="0", STRUCK_TURN="3", STRUCK_HOW="SIGKILL")
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    assert "Rank 0 is lost" in stopped.stderr
    done = together(arguments(config, run, *ddp(2), "--ckpt_path=last"))
    assert done.returncode == 0, done.stderr
    assert_same_state(saved_state(run), saved_state(whole))
    assert (run / "edits.jsonl").read_text() == (whole / "edits.jsonl").read_text()


def test_final_scores_are_interrupted_on_all_ranks_and_taken_by_the_resumed_run(tmp_path: Path, config: Path) -> None:
    """Every turn is saved by then: the rank that was asked stops at once, and the other does not wait for it."""
    script, run = tmp_path / "struck.py", tmp_path / "run"
    script.write_text(STRUCK)
    late = {"STRUCK_RANK": "1", "STRUCK_TURN": str(FINAL_SCORES), "STRUCK_HOW": "SIGTERM"}
    stopped = together(arguments(config, run, *ddp(2)), script, **late)
    assert stopped.returncode == 1 and not (run / "results.json").exists(), stopped.stderr
    assert "rank 1 said: Stopped by SIGTERM after turn 7" in stopped.stderr and "--ckpt_path last" in stopped.stderr
    done = together(arguments(config, run, *ddp(2), "--ckpt_path=last"))
    assert done.returncode == 0 and results(run)["edits"] == 33, done.stderr


def test_one_process_goes_on_as_four_and_a_difference_between_ranks_stops_them(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, whole, run = tmp_path / "struck.py", tmp_path / "whole", tmp_path / "run"
    script.write_text(STRUCK)
    alone(monkeypatch, arguments(config, whole))
    alone(monkeypatch, arguments(config, run, "--trainer.max_steps=3"))
    stopped = together(
        arguments(config, run, *ddp(2), "--ckpt_path=last"),
        script,
        STRUCK_RANK="1",
        STRUCK_TURN="3",
        STRUCK_HOW="bitflip",
    )
    assert stopped.returncode == 1
    assert "After turn 4 the ranks do not hold the same bytes as rank 0" in stopped.stderr
    assert "model.model.layers.0.mlp.down_proj" in stopped.stderr and "on rank 1" in stopped.stderr
    assert not (run / "checkpoints/turn=4.ckpt").exists()
    done = together(arguments(config, run, *ddp(4), "--ckpt_path=last"))
    assert done.returncode == 0, done.stderr
    assert_same_run(run, whole, weights_at(whole, 0))


def test_torchrun_and_the_other_verbs(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun a stream is scored and asked: every edit once, in its order."""
    port = free_port()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    run, one = tmp_path / "run", tmp_path / "one"
    short = ["--trainer.max_steps=3", "--data.evaluation_batch_size=5"]
    for given in (
        arguments(config, run, *short, *ddp(2)),
        ["predict", *arguments(config, run, *short, *ddp(2), "--ckpt_path=last")[1:]],
    ):
        done = subprocess.run(
            [*launch, "-m", "stableedit_pl", *given],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    alone(monkeypatch, arguments(config, one, *short))
    alone(monkeypatch, ["predict", *arguments(config, one, *short, "--ckpt_path=last")[1:]])
    assert_same_run(run, one, weights_at(one, 0))
    answers = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [f"e0-{i}" for i in range(33)]
    assert (run / "predictions.jsonl").read_text() == (one / "predictions.jsonl").read_text()


# Stands in for srun: as many tasks as the job has, each told its place as SLURM tells it. --signal's warning is the
# blow of STRUCK; the status is the largest of the tasks', as srun's is.
SRUN = """
import os, subprocess, sys
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(
        [sys.executable, os.environ["STRUCK_SCRIPT"], *sys.argv[2:]],
        env={**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "LOCAL_RANK": str(i)},
    )
    for i in range(count)
]
sys.exit(max(task.wait() for task in tasks))
"""


def test_a_slurm_job_is_requeued_and_goes_on_bit_for_bit(tmp_path: Path, config: Path) -> None:
    programs, struck, asked = tmp_path / "bin", tmp_path / "struck.py", tmp_path / "asked"
    programs.mkdir()
    struck.write_text(STRUCK)
    for name, text in (("srun", f"#!{sys.executable}\n{SRUN}"), ("scontrol", f'#!/bin/sh\necho "$@" >> {asked}\n')):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "stableedit",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "STRUCK_SCRIPT": str(struck),
        "STRUCK_RANK": "1",
        "STRUCK_HOW": "SIGUSR1",
    }

    def submitted(run: Path, struck_turn: int) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(ROOT / "scripts/slurm.sbatch"), str(config), str(run)]
        given = environment(**job, STRUCK_TURN=str(struck_turn), MASTER_PORT=str(free_port()))
        return subprocess.run(command, env=given, capture_output=True, text=True, timeout=120, check=False)

    whole, run = tmp_path / "whole", tmp_path / "run"
    done = submitted(whole, -2)
    assert done.returncode == 0 and not asked.exists(), done.stderr
    stopped = submitted(run, 3)
    assert stopped.returncode == 128 + signal.SIGUSR1, stopped.stderr
    assert asked.read_text() == "requeue 4711\n", "once, by rank 0"
    assert "SLURM has job 4711 in its queue again" in stopped.stderr
    assert "Stopped by SIGUSR1 after turn 4" in stopped.stderr
    assert not list(run.glob("hpc_ckpt*")), "Lightning's own would be taken for the newest checkpoint"
    done = submitted(run, -2)
    assert done.returncode == 0, done.stderr
    assert_same_state(saved_state(run), saved_state(whole))
    assert (run / "edits.jsonl").read_text() == (whole / "edits.jsonl").read_text()


def test_two_nodes_under_torchrun(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two agents, as on two nodes with a device each: both of their processes are local rank 0."""
    port, run, one = free_port(), tmp_path / "run", tmp_path / "one"
    short = ["--trainer.max_steps=3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launch += ["--master_addr=127.0.0.1", f"--master_port={port}", "-m", "stableedit_pl"]
    given = arguments(config, run, *short, "--trainer.num_nodes=2", *ddp(1))
    agents = [
        subprocess.Popen(
            [*launch[:5], f"--node_rank={node}", *launch[5:], *given],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    alone(monkeypatch, arguments(config, one, *short))
    assert_same_run(run, one, weights_at(one, 0))
    assert results(run)["settings"]["processes"] == 2
