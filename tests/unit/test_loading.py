"""The base model: frozen, in eval mode, in the dtype asked for; and errors that say what was given."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_model, tiny_gpt2, tiny_llama
from transformers import BloomConfig

from stableedit_pl.demo import demo_path
from stableedit_pl.model.loading import (
    LoadingError,
    context_length,
    load_language_model,
    load_skeleton,
    load_tokenizer,
    resolve_base_model,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of its own, to be spoiled."""
    return Path(save_model(tmp_path / "model", tiny_llama()))


def test_the_model_is_frozen_and_in_eval_mode(llama_folder: str) -> None:
    model = load_language_model(llama_folder)
    assert not model.training and not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters(), strict=True))


@pytest.mark.parametrize(
    ("asked", "float32_gives", "bfloat16_gives"),
    [
        ("auto", torch.float32, torch.bfloat16),
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("float16", torch.float16, torch.float16),
    ],
)
def test_the_dtype_asked_for(
    llama_folder: str, llama_bf16_folder: str, asked: str, float32_gives: Any, bfloat16_gives: Any
) -> None:
    assert load_language_model(llama_folder, asked).dtype == float32_gives
    assert load_language_model(llama_bf16_folder, asked).dtype == bfloat16_gives


def test_an_unknown_dtype_is_refused(llama_folder: str) -> None:
    with pytest.raises(ValueError):
        load_language_model(llama_folder, "bf16")


def test_the_tokenizer(llama_folder: str) -> None:
    assert load_tokenizer(llama_folder)("w0 w1")["input_ids"] == [1, 4, 5]


def test_the_files_are_left_as_they_were(folder: Path) -> None:
    before = {file: file.read_bytes() for file in folder.iterdir()}
    model = load_language_model(str(folder))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    load_tokenizer(str(folder))
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_the_context_is_the_configurations(llama_folder: str, gpt2_folder: str, tmp_path: Path) -> None:
    assert context_length(llama_folder) == 32 and context_length(gpt2_folder) == 32
    BloomConfig().save_pretrained(tmp_path)
    assert context_length(str(tmp_path)) is None


def test_demo_is_the_model_shipped_with_the_package() -> None:
    assert resolve_base_model("demo") == str(demo_path("model"))
    assert resolve_base_model("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert (demo_path("model") / "config.json").is_file()


LOADERS = [load_language_model, load_tokenizer, context_length]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("place", ["missing", "empty"])
def test_a_folder_without_a_model_is_refused_saying_what_to_give(load: Any, place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(LoadingError) as raised:
        load(str(tmp_path / place))
    message = str(raised.value)
    assert f"base_model {str(tmp_path / place)!r}: no config.json in" in message
    assert "save_pretrained" in message and "demo" in message


@pytest.mark.parametrize("load", LOADERS)
def test_a_relative_path_that_is_none_is_no_hub_id(load: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadingError, match=r"base_model './models/x': no config.json"):
        load("./models/x")


@pytest.mark.parametrize(
    "load",
    [
        load_language_model,
        load_tokenizer,
        pytest.param(
            context_length,
        ),
    ],
)
def test_a_hub_id_that_cannot_be_had_is_a_loading_error(load: Any, monkeypatch: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def offline(*_args: Any, **_kwargs: Any) -> None:
        raise OSError("we could not connect")

    for auto in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", offline)
    with pytest.raises(LoadingError, match=r"somebody/no-such-model.*could not connect"):
        load("somebody/no-such-model")


def test_a_tilde_is_the_home_directory(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert context_length("~/model") == 32


def test_weights_of_another_model_are_an_error(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_type"}))
    with pytest.raises(LoadingError, match="no_such_type"):
        load_language_model(str(folder))


def test_a_model_that_is_no_causal_language_model_is_an_error(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(LoadingError, match="cannot load base_model"):
        load_language_model(str(folder))


def test_missing_weights_are_a_loading_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(LoadingError, match="cannot load base_model"):
        load_language_model(str(folder))


def test_truncated_weights_are_a_loading_error(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(LoadingError):
        load_language_model(str(folder))


def test_a_folder_without_a_tokenizer_is_a_loading_error(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(LoadingError, match="cannot load the tokenizer of base_model"):
        load_tokenizer(str(folder))


# ---- weights that would be drawn, laid over or rounded


def change_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def change_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("load", [*LOADERS, load_skeleton])
def test_a_folder_with_an_adapter_is_refused_saying_how_to_merge(load: Any, folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(LoadingError) as raised:
        load(str(folder))
    assert "PEFT adapter (adapter_config.json)" in str(raised.value)
    assert f"PeftModel.from_pretrained(model, {str(folder)!r}).merge_and_unload()" in str(raised.value)
    (folder / "config.json").unlink()
    with pytest.raises(LoadingError, match="PEFT adapter"):
        load(str(folder))


def test_weights_that_the_files_lack_are_refused_by_name(folder: Path) -> None:
    change_weights(folder, lambda weights: [weights.pop(name) for name in ("lm_head.weight", "model.norm.weight")])
    with pytest.raises(LoadingError, match=r"\(missing: lm_head.weight, model.norm.weight\)"):
        load_language_model(str(folder))


def test_weights_of_another_size_are_refused_by_name(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(8)}))
    with pytest.raises(LoadingError, match=r"of another size: model.norm.weight \[8\], should be \[16\]"):
        load_language_model(str(folder))


def test_many_missing_weights_are_counted(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(LoadingError, match=r"missing: model.layers.2.*, .* and 4 more"):
        load_language_model(str(folder))


@pytest.mark.parametrize("model", [tiny_llama(tied=True), tiny_gpt2()], ids=["llama", "gpt2"])
def test_weights_that_are_tied_and_names_that_nobody_asks_for_are_no_fault(model: Any, tmp_path: Path) -> None:
    folder = Path(save_model(tmp_path / "tied", model))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    change_weights(folder, lambda weights: weights.update({"value_head.weight": torch.ones(3)}))
    assert torch.equal(load_language_model(str(folder)).lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("quantization", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "of_next_year"}, "of_next_year"),
        ({"bits": 4}, "quantization_config"),
    ],
)
@pytest.mark.parametrize("load", [load_language_model, load_skeleton])
def test_a_quantized_model_is_refused_whatever_packages_are_there(
    load: Any, quantization: Any, kind: str, folder: Path
) -> None:
    change_config(folder, quantization_config=quantization)
    with pytest.raises(LoadingError, match=rf"is quantized \({kind} in its config.json\).*unquantized model"):
        load(str(folder))


# ---- what other libraries say, as one sentence


def test_a_model_that_brings_its_own_code_is_refused_without_a_question(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("builtins.input", lambda _text: pytest.fail("asked at the terminal"))
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    for load in (load_language_model, context_length, load_skeleton):
        with pytest.raises(LoadingError, match=r"there is no setting trust_remote_code. Give a version"):
            load(str(folder))


def test_code_beside_a_model_that_transformers_knows_is_not_needed(folder: Path) -> None:
    change_config(folder, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    assert load_language_model(str(folder)).config.model_type == "llama"


def test_a_tokenizer_that_brings_its_own_code_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(LoadingError, match=r"the tokenizer of base_model .* needs program code"):
        load_tokenizer(str(folder))


def test_a_tokenizer_file_of_another_version_says_what_to_do(folder: Path) -> None:
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["type"] = "OfNextYear"
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(LoadingError, match=r"cannot load the tokenizer .* another version .*: upgrade tokenizers"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("settings", "load", "said"),
    [
        ({"rope_parameters": {"rope_type": "of_next_year"}}, load_language_model, "KeyError: 'of_next_year'"),
        ({"num_hidden_layers": "two"}, load_language_model, "num_hidden_layers"),
        ({"dtype": "float7"}, context_length, "float7"),
    ],
)
def test_other_errors_of_libraries_are_loading_errors(settings: Any, load: Any, said: str, folder: Path) -> None:
    change_config(folder, **settings)
    with pytest.raises(LoadingError, match=f"cannot load .*{said}"):
        load(str(folder))


def test_weights_that_are_no_archive_are_a_loading_error(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"half a download")
    with pytest.raises(LoadingError, match="cannot load base_model"):
        load_language_model(str(folder))
