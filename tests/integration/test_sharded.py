"""Ranks that divide a model's weights: the same run as one process, whichever way they divide them."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from edit_runs import PASSES, assert_same_state, curves, results, saved_state
from rank_runs import STRUCK, alone, arguments, assert_same_run, rank_settings, together, weights_at
from tiny import relative_difference, save_model, tiny_llama
from transformers import AutoModelForCausalLM

from stableedit_pl import EditTrainer, LifelongEditor
from stableedit_pl.cli.command import main

CONFIGS = Path(__file__).parents[2] / "configs"

FSDP_2 = ["2", "1"]
TENSOR_2 = ["2", "2"]
BOTH = ["4", "2"]
FSDP_4 = ["4", "1"]

# In place of a flipped bit in a weight, which no other rank holds: one in a mean, which all do.
STRUCK_SHARDED = STRUCK.replace("now = batch.index", "now, held[:] = batch.index, [self]").replace(
    "args[1][0].module.weight.data[0, 0] += 1e-3",
    'next(t for n, t in held[0].state.statistics.tensors().items() if n.endswith("keys/mean"))[0] += 1e-3',
)
STRUCK_SHARDED = STRUCK_SHARDED.replace("now = -1", "now, held = -1, []")


def sharded(way: list[str]) -> list[str]:
    """Laid over the configuration: so many processes, so many of which divide layers."""
    devices, tensor = way
    return [
        f"--config={CONFIGS / 'sharded.yaml'}",
        f"--trainer.devices={devices}",
        f"--trainer.strategy.init_args.tensor_parallel_size={tensor}",
        "--trainer.strategy.init_args.rank_timeout=60",
    ]


@pytest.fixture(scope="session")
def odd_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Widths 18 and 34: four ranks get 5, 5, 5, 3 rows and 9, 9, 9, 7."""
    model = tiny_llama(hidden=18, intermediate=34, layers=3, kv_heads=2, head_dim=6)
    return save_model(tmp_path_factory.mktemp("odd"), model)


@pytest.fixture
def config(tmp_path: Path, odd_llama: str, warmup_file: str) -> Path:
    """33 edits in turns of 8, the fifth with one; a site divided by columns, two by rows; a layer below them all."""
    sites = ["model.layers.1.mlp.up_proj", "model.layers.{1..2}.mlp.down_proj"]
    model = {"base_model": odd_llama, "sites": sites, "step_size": 2e-3, "passes": PASSES}
    settings = rank_settings(model, tmp_path / "edits.jsonl", warmup_file, {"also_score": ["greedy_match"]})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def assert_same_curves(run: Path, expected: Path) -> None:
    """Stability and scores, turn by turn: norms and cosines are over whole weights."""
    here, there = curves(run), curves(expected)
    assert here.keys() == there.keys()
    assert any("weight_norm_ratio" in name for name in here) and any("survived" in name for name in here)
    for name, points in here.items():
        assert [step for step, _ in points] == [step for step, _ in there[name]], name
        values = [value for _, value in there[name]]
        assert [value for _, value in points] == pytest.approx(values, rel=2e-3, abs=2e-3), name


@pytest.mark.parametrize("way", [FSDP_2, TENSOR_2, BOTH, FSDP_4], ids=["fsdp", "tensor", "both", "fsdp-uneven"])
def test_a_sharded_run_ends_where_one_process_does(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, way: list[str]
) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    alone(monkeypatch, arguments(config, one))
    done = together([*arguments(config, run), *sharded(way)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("retained") == 1, "rank 0 alone shows the scores"
    assert "unwaited collective" not in done.stderr, "torch keeps what nobody waits for"
    assert_same_run(run, one, weights_at(one, 0))
    assert_same_curves(run, one)
    assert results(run)["settings"]["processes"] == int(way[0])
    assert_same_state(weights_at(run, 0), weights_at(one, 0))


def test_a_coarse_model_is_rounded_from_divided_masters(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 weights, float32 masters: the checkpoint holds whole masters, equal bytes before the first turn."""
    coarse = "--model.model_dtype=bfloat16"
    one, run = tmp_path / "one", tmp_path / "run"
    alone(monkeypatch, arguments(config, one, coarse))
    done = together([*arguments(config, run, coarse), *sharded(BOTH)])
    assert done.returncode == 0, done.stderr
    before, state, expected = weights_at(one, 0), saved_state(run), saved_state(one)
    for name, start in before.items():
        assert state[name].dtype == torch.float32
        # The model's own arithmetic has three digits, and sums differ between one process and two.
        assert relative_difference(state[name] - start, expected[name] - start) < 0.1, name
    assert_same_state(weights_at(run, 0), before)


def test_checkpoints_pass_between_one_process_and_many(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process begins, two that divide weights by rows go on, four that divide both ways, and one ends."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    alone(monkeypatch, arguments(config, whole))
    alone(monkeypatch, arguments(config, run, "--trainer.max_steps=3"))
    for way, turns in ((FSDP_2, 5), (BOTH, 6)):
        done = together([*arguments(config, run, "--ckpt_path=last"), *sharded(way), f"--trainer.max_steps={turns}"])
        assert done.returncode == 0, done.stderr
    alone(monkeypatch, arguments(config, run, "--ckpt_path=last"))
    assert_same_run(run, whole, weights_at(whole, 0))
    main(["verify", f"--run={run}"])
    main(["export", f"--run={run}", f"--out={tmp_path / 'exported'}"])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    for name, weight in weights_at(run, 7).items():
        assert torch.equal(exported[name.removeprefix("model.")], weight), name


def test_a_lost_rank_is_named_and_the_same_ranks_go_on_bit_for_bit(tmp_path: Path, config: Path) -> None:
    script, whole, run = tmp_path / "struck.py", tmp_path / "whole", tmp_path / "run"
    script.write_text(STRUCK_SHARDED)
    given = [*arguments(config, run), *sharded(FSDP_2)]
    assert together([*arguments(config, whole), *sharded(FSDP_2)]).returncode == 0
    stopped = together(given, script, STRUCK_RANK="1", STRUCK_TURN="3", STRUCK_HOW="SIGKILL")
    assert stopped.returncode == 1, stopped.stderr
    assert "Rank 1 is lost" in stopped.stderr and "--ckpt_path last" in stopped.stderr
    stopped = together([*given, "--ckpt_path=last"], script, STRUCK_RANK="1", STRUCK_TURN="4", STRUCK_HOW="SIGTERM")
    assert stopped.returncode == 143, stopped.stderr
    assert stopped.stderr.count("Stopped by SIGTERM after turn 5") == 1
    done = together([*given, "--ckpt_path=last"])
    assert done.returncode == 0, done.stderr
    assert_same_state(saved_state(run), saved_state(whole))
    assert (run / "edits.jsonl").read_text() == (whole / "edits.jsonl").read_text()


def test_ranks_that_should_hold_the_same_and_do_not_are_stopped(tmp_path: Path, config: Path) -> None:
    script, run = tmp_path / "struck.py", tmp_path / "run"
    script.write_text(STRUCK_SHARDED)
    given = [*arguments(config, run), *sharded(TENSOR_2)]
    stopped = together(given, script, STRUCK_RANK="1", STRUCK_TURN="3", STRUCK_HOW="bitflip")
    assert stopped.returncode == 1, stopped.stderr
    assert "After turn 4 the ranks do not hold the same bytes as rank 0" in stopped.stderr
    assert "keys/mean on rank 1" in stopped.stderr
    assert not (run / "checkpoints/turn=4.ckpt").exists()


@pytest.mark.parametrize("way", [FSDP_2, BOTH], ids=["fsdp", "both"])
def test_every_edit_is_asked_once_also_where_answers_have_different_lengths(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, way: list[str]
) -> None:
    run = tmp_path / "run"
    alone(monkeypatch, arguments(config, run, "--trainer.max_steps=3"))
    asked = ["predict", *arguments(config, run, "--ckpt_path=last", "--data.evaluation_batch_size=5")[1:]]
    alone(monkeypatch, asked)
    answers = (run / "predictions.jsonl").read_text()
    assert [json.loads(line)["id"] for line in answers.splitlines()] == [f"e0-{i}" for i in range(33)]
    (run / "predictions.jsonl").unlink()
    done = together([*asked, *sharded(way)])
    assert done.returncode == 0, done.stderr
    assert (run / "predictions.jsonl").read_text() == answers
    scored = ["test", *arguments(config, run, "--ckpt_path=last")[1:]]
    done = together([*scored, *sharded(way)])
    expected = together(scored)
    assert done.returncode == 0, done.stderr
    assert (
        [line for line in done.stdout.splitlines() if line.startswith("edited")]
        == [line for line in expected.stdout.splitlines() if line.startswith("edited")]
        != []
    )


def test_bad_turns_are_refused_by_all_or_none(tmp_path: Path, config: Path) -> None:
    """An update that leaves float16's range in one rank's shard takes the turn from every rank."""
    run = tmp_path / "run"
    done = together(
        [
            *arguments(config, run, "--model.model_dtype=float16", "--model.step_size=1e5", "--model.bad_turns=skip"),
            "--model.passes=1",  # a further pass would find losses that are not finite first
            *sharded(FSDP_2),
            "--trainer.max_steps=3",
        ]
    )
    assert done.returncode == 0, done.stderr
    assert "takes the weight" in done.stderr + (run / "rejected.jsonl").read_text()
    assert not (run / "edits.jsonl").exists() and not any(results(run)["retained"].values())


def test_what_does_not_fit_together_is_refused(tmp_path: Path, config: Path, gpt2_folder: str) -> None:
    run = tmp_path / "run"
    for more, message in (
        (["--trainer.strategy.init_args.data_parallel_size=3"], "data_parallel_size=3 times tensor_parallel_size=1"),
        (
            [
                "--trainer.strategy.init_args.tensor_parallel_size=2",
                f"--model.base_model={gpt2_folder}",
                '--model.sites=["transformer.h.1.mlp.c_proj"]',
            ],
            "GPT2LMHeadModel states no tensor-parallel plan",
        ),
        (["--trainer.callbacks+=DevicePlacement"], "leave out DevicePlacement, or use ddp"),
    ):
        stopped = together([*arguments(config, run), *sharded(FSDP_2), *more])
        assert stopped.returncode == 1, stopped.stderr
        assert message in stopped.stderr


def test_conv1d_sites_are_divided_by_their_inputs(
    tmp_path: Path, config: Path, gpt2_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 stores weights the other way round: FSDP2's rows are the site's inputs. Its embeddings are tied."""
    model = [f"--model.base_model={gpt2_folder}", '--model.sites=["transformer.h.{0..1}.mlp.c_proj"]']
    one, run = tmp_path / "one", tmp_path / "run"
    alone(monkeypatch, arguments(config, one, *model))
    done = together([*arguments(config, run, *model), *sharded(FSDP_2)])
    assert done.returncode == 0, done.stderr
    assert_same_run(run, one, weights_at(one, 0))


def test_one_device_is_no_special_case(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    alone(monkeypatch, arguments(config, one))
    done = together([*arguments(config, run), *sharded(["1", "1"])])
    assert done.returncode == 0, done.stderr
    assert_same_state(saved_state(run), saved_state(one))


def test_a_name_is_enough(tmp_path: Path, odd_llama: str) -> None:
    trainer = EditTrainer(run_dir=str(tmp_path), accelerator="cpu", devices=2, strategy="sharded", rank_timeout=7.0)
    assert type(trainer.strategy).__name__ == "ShardedStrategy"
    assert trainer.strategy._timeout.total_seconds() == 7.0  # type: ignore[attr-defined]
    editor = LifelongEditor(odd_llama, sites=["model.layers.1.mlp.down_proj"])
    assert editor.device_mesh is None
