"""The command line, in process: every verb, what it prints, what it refuses and its exit codes."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from edit_runs import ledger, results, saved_state
from tiny import LLAMA_SITE, edit_rows, write_stream
from transformers import AutoModelForCausalLM, AutoTokenizer

from stableedit_pl.cli.command import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stableedit"])


@pytest.fixture
def base(llama_folder: str, stream_file: str) -> list[str]:
    return [
        f"--model.base_model={llama_folder}",
        f'--model.sites=["{LLAMA_SITE}"]',
        "--model.step_size=1e-2",
        f"--data.path={stream_file}",
        "--data.turn_size=8",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code
    return capsys.readouterr().err


def test_fit_then_score_then_predict_then_export(
    tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "edited"
    where = [f"--run_dir={run}"]
    main(["fit", *base, *where])
    shown = capsys.readouterr().out
    found = results(run)
    assert f"{found['retained']['efficacy']:.3f}" in shown and f"tensorboard --logdir {run}" in shown
    expected = {"config.yaml", "edits.jsonl", "results.json", "statistics.safetensors", "checkpoints"}
    assert expected <= {file.name for file in run.iterdir()}
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["step_size"] == 1e-2 and saved["run_dir"] == str(run)

    main(["validate", *base, *where, "--ckpt_path=last"])
    assert f"edited     {found['retained']['efficacy']:.3f}" in capsys.readouterr().out
    main(["test", *base, *where])
    assert f"base     {found['base']['efficacy']:.3f}" in capsys.readouterr().out

    main(["predict", *base, *where, "--ckpt_path=last"])
    answers = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [line["id"] for line in ledger(run)]

    edited = (run / "predictions.jsonl").read_bytes()
    main(["predict", *base, *where])
    assert (run / "predictions.jsonl").read_bytes() == edited != (run / "predictions-base.jsonl").read_bytes()

    main(["export", f"--run={run}", f"--out={out}"])
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    weight = model.get_submodule(LLAMA_SITE).weight
    assert torch.equal(weight.detach(), saved_state(run)[f"model.{LLAMA_SITE}.weight"])
    for answer in answers:
        ids = tokenizer(answer["prompt"], return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=len(answer["target"].split()), do_sample=False)
        assert tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True) == answer["answer"]
    card = (out / "README.md").read_text()
    assert LLAMA_SITE in card and "33 edits in 5 turns, after 0 warm-up turns" in card
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in out.iterdir()), "others can read it"
    events = sorted(file.name for file in run.glob("events.out.tfevents.*"))
    assert len(events) == 1, "scoring must not write event files"


def test_results_equal_an_independent_evaluation_of_the_export(
    tmp_path: Path, base: list[str], llama_folder: str
) -> None:
    """Token match computed here, one prompt at a time, from the exported folder and the base model alone."""
    run, out = tmp_path / "run", tmp_path / "edited"
    main(["fit", *base, f"--run_dir={run}"])
    main(["export", f"--run={run}", f"--out={out}"])
    tokenizer = AutoTokenizer.from_pretrained(out)
    edited, unedited = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, llama_folder))

    def first_choices(model: torch.nn.Module, prompt: str, target: str) -> list[int]:
        prompt_ids, target_ids = (
            tokenizer(prompt)["input_ids"],
            tokenizer(" " + target, add_special_tokens=False)["input_ids"],
        )
        logits = model(torch.tensor([prompt_ids + target_ids])).logits[0]
        return logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()

    def token_match(model: torch.nn.Module, prompt: str, target: str) -> float:
        expected = tokenizer(" " + target, add_special_tokens=False)["input_ids"]
        return sum(a == b for a, b in zip(first_choices(model, prompt, target), expected, strict=True)) / len(expected)

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    rows, found = edit_rows(33), results(run)
    for name, model in (("retained", edited), ("base", unedited)):
        efficacy = mean([token_match(model, row["prompt"], row["target"]) for row in rows])
        general = mean([mean([token_match(model, text, row["target"]) for text in row["rephrases"]]) for row in rows])
        assert found[name]["efficacy"] == pytest.approx(efficacy, abs=1e-9)
        assert found[name]["generalization"] == pytest.approx(general, abs=1e-9)
    kept = []
    for row in rows:
        for probe in row["locality"]:
            before, after = (first_choices(m, probe["prompt"], probe["target"]) for m in (unedited, edited))
            kept.append(mean([a == b for a, b in zip(before, after, strict=True)]))
    assert found["retained"]["specificity"] == pytest.approx(mean(kept), abs=1e-9)


def test_files_laid_over_one_another_and_short_names(tmp_path: Path, base: list[str], warmup_file: str) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("model: {ridge: 3.0, step_size: 0.5}\ntrainer: {callbacks: [{class_path: StabilityMonitor}]}\n")
    second.write_text(
        f"model: {{ridge: 4.0}}\ndata: {{warmup_path: {warmup_file}}}\n"
        "trainer: {callbacks+: [{class_path: WarmUp}]}\n"
    )
    main(
        [
            "fit",
            f"--config={first}",
            f"--config={second}",
            *base,
            f"--run_dir={tmp_path / 'run'}",
            "--trainer.callbacks+=EditEvaluation",
            "--trainer.callbacks.every_n_turns=3",
            "--trainer.max_steps=3",
        ]
    )
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["model"]["ridge"] == 4.0 and saved["model"]["step_size"] == 1e-2
    names = [callback["class_path"].split(".")[-1] for callback in saved["trainer"]["callbacks"]]
    assert names == ["StabilityMonitor", "WarmUp", "EditEvaluation"]
    assert [line["phase"] for line in ledger(tmp_path / "run")] == ["warmup"] * 14 + ["edit"] * 8


def test_a_callback_is_changed_by_its_name_and_named_again_is_replaced(
    tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    listed = "{class_path: EditEvaluation, init_args: {sample_size: 7, seed: 3}}"
    first.write_text(f"trainer: {{callbacks: [StabilityMonitor, {listed}]}}\n")
    second.write_text("trainer:\n  callbacks: [EditEvaluation]\n")

    def callbacks(*arguments: str) -> dict[str, dict]:
        with pytest.raises(SystemExit) as stopped:
            main(["fit", *base, *arguments, "--print_config"])
        assert stopped.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
        return {item["class_path"].split(".")[-1]: item["init_args"] for item in printed}

    found = callbacks(
        f"--config={first}",
        "--trainer.callbacks.EditEvaluation.every_n_turns=4",
        "--trainer.callbacks.TurnCheckpoint.keep",
        "5",
    )
    assert list(found) == ["StabilityMonitor", "EditEvaluation", "TurnCheckpoint"]
    assert {"sample_size": 7, "seed": 3, "every_n_turns": 4}.items() <= found["EditEvaluation"].items()
    assert found["TurnCheckpoint"]["keep"] == 5

    main(["fit", *base, f"--config={first}", "--trainer.callbacks+=EditEvaluation", "--trainer.callbacks.seed=9",
          f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=1"])  # fmt: skip
    assert "EditEvaluation is named twice: the later one replaces the first" in capsys.readouterr().err
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["trainer"]["callbacks"]
    assert [item["class_path"].split(".")[-1] for item in saved] == ["StabilityMonitor", "EditEvaluation"]
    assert saved[1]["init_args"]["seed"] == 9 and saved[1]["init_args"]["sample_size"] == 200

    with pytest.raises(SystemExit):
        main(["fit", *base, f"--config={first}", f"--config={second}", "--print_config"])
    said = capsys.readouterr().err
    assert f"{second}, line 2: callbacks: replaces the list of {first} and drops StabilityMonitor; callbacks+:" in said


def test_one_site_and_a_negative_number_need_no_brackets_and_no_equals_sign(
    tmp_path: Path, llama_folder: str, stream_file: str, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "step_size must be positive, got -0.001" in fails(["fit", *base, "--model.step_size", "-1e-3"], capsys)
    plain = [argument for argument in base if not argument.startswith("--model.sites")]
    run = tmp_path / "run"
    main(["fit", *plain, "--model.sites", LLAMA_SITE, f"--run_dir={run}", "--trainer.max_steps=1"])
    assert next(iter(saved_state(run))) == f"model.{LLAMA_SITE}.weight"
    assert results(run)["settings"]["model"]["sites"] == [LLAMA_SITE]
    main(["export", f"--run={run}", f"--out={tmp_path / 'out'}"])


def test_print_config_is_a_configuration_that_runs(
    tmp_path: Path, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *base, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=1", "--print_config"])
    assert stopped.value.code == 0
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    main(["fit", f"--config={file}"])
    assert len(ledger(tmp_path / "run")) == 8


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict", "export"])
def test_every_argument_has_a_sentence(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    if verb != "export":
        assert "weight of the update's squared norm" in " ".join(shown.split())
    lines = shown.splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("  --") or line.startswith("  -c")]
    bare = [lines[i] for i in options if i + 1 in options and len(lines[i].split("  ")) < 3]
    assert not bare


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--trainer.accumulate_grad_batches=2", "use data.turn_size"),
        ("--trainer.limit_train_batches=3", "use trainer.max_steps as the horizon"),
        ("--trainer.gradient_clip_val=1.0", "use model.ridge"),
        ("--trainer.max_epochs=2", "use max_epochs=1"),
        ("--trainer.max_epochs=-1", "use max_epochs=1"),
        ("--trainer.overfit_batches=1", "use data.max_edits"),
        ("--model.ridge=0", "ridge must be positive, got 0"),
        ("--model.prior_strength=-1", "prior_strength must be zero or positive"),
        ("--data.turn_size=0", "data.turn_size must be at least 1"),
        ('--model.sites=["model.layers.1.mlp.downproj"]', f"Near matches: {LLAMA_SITE}"),
        ('--model.sites=["model.norm"]', "cannot be edited"),
        ("--model.base_model=/nowhere", "no config.json in /nowhere"),
        ("--data.path=/nowhere.jsonl", "/nowhere.jsonl"),
        ("--ckpt_path=last", "nothing to resume"),
        ("--data.warmup_path=STREAM", "add the callback WarmUp"),
        ("--trainer.callbacks+=WarmUp", "set data.warmup_path"),
    ],
)
def test_refused_with_what_to_do_and_exit_code_1(
    tmp_path: Path, base: list[str], option: str, said: str, stream_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    option = option.replace("STREAM", stream_file)
    message = fails(["fit", *base, f"--run_dir={tmp_path / 'run'}", option], capsys)
    assert said in message and "Traceback" not in message
    assert not (tmp_path / "run/edits.jsonl").exists() and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.rigde=1", "rigde"),
        ("--model.normalization=whitened", "normalization"),
        ("--model.ridge=high", "ridge"),
    ],
)
def test_wrong_arguments_exit_with_code_2(
    tmp_path: Path, base: list[str], option: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in fails(["fit", *base, f"--run_dir={tmp_path / 'run'}", option], capsys, code=2)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "w1", "target": ""}, ['line 2, field "target"', "empty"]),
        ({"prompt": "w1"}, ['field "target"', "line 2"]),
        ({"prompt": "w1", "target": None}, ["null"]),
        ({"prompt": "w1", "target": 5}, ["number 5"]),
        ({"id": "e0-0", "prompt": "w1", "target": "w2"}, ["e0-0", "line 2"]),
        ({"prompt": "w1 " * 40, "target": "w2"}, ["row 2", 'field "prompt"', "context is 32"]),
        ({"prompt": "w1", "target": "w2", "rephrases": ["w3 " * 40]}, ["row 2", 'field "rephrases"', "context is 32"]),
    ],
)
def test_a_bad_row_is_named_before_any_weight_is_touched(
    tmp_path: Path, base: list[str], row: dict, said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_stream(tmp_path / "bad.jsonl", [edit_rows(1)[0], row])
    message = fails(["fit", *base, f"--data.path={file}", f"--run_dir={tmp_path / 'run'}"], capsys)
    assert str(file) in message and "Traceback" not in message
    for words in said:
        assert words in message
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_that_failed_before_its_first_turn_does_not_block_the_directory(tmp_path: Path, base: list[str]) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit):
        main(["fit", *base, f"--run_dir={run}", '--model.sites=["nothing"]'])
    main(["fit", *base, f"--run_dir={run}", "--trainer.max_steps=1"])
    assert len(ledger(run)) == 8
