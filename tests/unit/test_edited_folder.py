"""The edited model's folder: the base model's files byte for byte, with nothing but the edited tensors exchanged."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import GPT2_SITE, LLAMA_SITE, save_model, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import LoadingError
from stableedit_pl.model.files import edited_folder


def edited(base: Path, site: str = LLAMA_SITE, dtype: str = "auto", by: float = 0.25) -> Any:
    """An editor with a weight that is not the base model's any more."""
    editor = LifelongEditor(base_model=str(base), sites=[site], step_size=1e-3, model_dtype=dtype)  # type: ignore[arg-type]
    editor.configure_model()
    with torch.no_grad():
        editor.sites[0].module.weight.add_(by)
    return editor


def base_of(folder: Path, model: Any = None, **options: Any) -> Path:
    save_model(folder, model or tiny_llama())
    if options:
        (model or tiny_llama()).save_pretrained(folder, **options)
        if "max_shard_size" in options:
            (folder / "model.safetensors").unlink()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def weight_of(folder: Path, site: str = LLAMA_SITE) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).get_submodule(site).weight.detach()


def differing_tensors(a: Path, b: Path) -> list[str]:
    old, new = load_file(a), load_file(b)
    assert list(old) == list(new) and all(old[name].dtype == new[name].dtype for name in old)
    return [name for name in old if not torch.equal(old[name], new[name])]


def test_everything_but_the_edited_tensor_stays_byte_for_byte(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5, "mine": [1]}))
    (base / "preprocessor_config.json").write_text("{ }")
    (base / "parts").mkdir()
    (base / "parts" / "notes.txt").write_text("kept")
    (base / "README.md").write_text("the base model's words")
    before = contents(base)
    editor = edited(base)
    editor.save_pretrained(str(tmp_path / "out"))
    assert contents(base) == before
    after = contents(tmp_path / "out")
    assert after.pop("README_base_model.md") == before.pop("README.md")
    assert after.keys() == before.keys()
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]
    weights = "model.safetensors"
    assert len(before[weights]) == len(after[weights])
    assert differing_tensors(base / weights, tmp_path / "out" / weights) == [f"{LLAMA_SITE}.weight"]
    assert torch.equal(weight_of(tmp_path / "out"), editor.sites[0].weight)


def test_shards_keep_their_layout_and_untouched_ones_their_bytes(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", max_shard_size="6KB")
    editor = edited(base)
    editor.save_pretrained(str(tmp_path / "out"))
    before, after = contents(base), contents(tmp_path / "out")
    index = json.loads(before["model.safetensors.index.json"])
    assert len(set(index["weight_map"].values())) > 2 and before.keys() == after.keys()
    changed = [name for name in before if before[name] != after[name]]
    assert changed == [index["weight_map"][f"{LLAMA_SITE}.weight"]]
    assert torch.equal(weight_of(tmp_path / "out"), editor.sites[0].weight)


def test_a_dtype_that_was_asked_for_is_written_and_stated(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", max_shard_size="6KB")
    shard = base / "model-00001-of-00003.safetensors"
    shard = shard if shard.is_file() else sorted(base.glob("*.safetensors"))[0]
    weights = load_file(shard)
    save_file(weights | {"nobody.asks": torch.ones(3)}, shard, {"format": "pt", "mine": "kept"})
    editor = edited(base, dtype="bfloat16")
    editor.save_pretrained(str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    sizes = 0
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = load_file(file)
        sizes += sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            assert tensor.dtype == (torch.float32 if name == "nobody.asks" else torch.bfloat16), name
    with safe_open(tmp_path / "out" / shard.name, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt", "mine": "kept"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sizes
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    for name, parameter in editor.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_a_dtype_that_is_the_files_changes_nothing_else(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tiny_llama().bfloat16())
    edited(base, dtype="bfloat16").save_pretrained(str(tmp_path / "out"))
    before, after = contents(base), contents(tmp_path / "out")
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]
    assert differing_tensors(base / "model.safetensors", tmp_path / "out" / "model.safetensors") == [
        f"{LLAMA_SITE}.weight"
    ]


@pytest.mark.parametrize(("stored", "stated"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_edits_are_not_rounded_where_files_and_configuration_differ(stored: str, stated: str, tmp_path: Path) -> None:
    """Loaded as the configuration says; written as the files are, unless that would round what was edited."""
    base = base_of(tmp_path / "base", tiny_llama().to(getattr(torch, stored)))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": stated}))
    editor = edited(base, by=0.001)
    editor.save_pretrained(str(tmp_path / "out"))
    assert torch.equal(weight_of(tmp_path / "out"), editor.sites[0].weight)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(t.dtype) for n, t in written.items() if LLAMA_SITE not in n} == {f"torch.{stored}"}


@pytest.mark.parametrize("change", ["prefix", "equal values"])
def test_the_tensor_is_found_whatever_it_is_called_in_the_file(change: str, tmp_path: Path) -> None:
    """GPT-2's files on hubs have no ``transformer.`` before their names; and many tensors may hold equal numbers."""
    base = base_of(tmp_path / "base", tiny_gpt2())
    file = base / "model.safetensors"
    weights = load_file(file)
    if change == "prefix":
        weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    else:
        for name in weights:
            if name.endswith("mlp.c_proj.weight"):
                weights[name] = torch.zeros_like(weights[name])
    save_file(weights, file, {"format": "pt"})
    editor = edited(base, GPT2_SITE)
    editor.save_pretrained(str(tmp_path / "out"))
    expected = GPT2_SITE.removeprefix("transformer.") if change == "prefix" else GPT2_SITE
    assert differing_tensors(file, tmp_path / "out" / "model.safetensors") == [f"{expected}.weight"]
    assert torch.equal(weight_of(tmp_path / "out", GPT2_SITE), editor.sites[0].weight)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_pickled_weights_stays_one(dtype: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tied=tied)
    base = base_of(tmp_path / "base", model)
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    editor = edited(base, dtype=dtype)
    editor.save_pretrained(str(tmp_path / "out"))
    assert contents(base).keys() == contents(tmp_path / "out").keys()
    size, old = ((folder / "pytorch_model.bin").stat().st_size for folder in (tmp_path / "out", base))
    assert size <= old, "tensors that shared memory still do"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in editor.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_weights_in_other_forms_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = base_of(tmp_path / "base")
    torch.save(tiny_llama().state_dict(), base / "pytorch_model.bin")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_bytes(b"weights")
    (base / "original" / "params.json").write_text("{}")
    (base / "model.gguf").write_bytes(b"weights")
    (base / ".git").mkdir()
    (base / ".git" / "config").write_text("")
    with caplog.at_level(logging.WARNING, "stableedit_pl"):
        edited(base).save_pretrained(str(tmp_path / "out"))
    assert "model.gguf, original/consolidated.00.pth, pytorch_model.bin" in caplog.text
    names = contents(tmp_path / "out").keys()
    assert "original/params.json" in names and not {name for name in names if name.endswith((".bin", ".pth", ".gguf"))}
    assert not (tmp_path / "out" / ".git").exists()


def test_an_earlier_exports_weights_do_not_outlive_it(tmp_path: Path) -> None:
    """A loader takes model.safetensors before an index, and an adapter over either."""
    base, out = base_of(tmp_path / "base", max_shard_size="6KB"), tmp_path / "out"
    save_model(out, tiny_llama(seed=1))
    (out / "adapter_config.json").write_text("{}")
    (out / "mine.txt").write_text("kept")
    editor = edited(base)
    editor.save_pretrained(str(out))
    assert torch.equal(weight_of(out), editor.sites[0].weight)
    assert contents(out).keys() == contents(base).keys() | {"mine.txt"}


@pytest.mark.parametrize("place", ["", "inside", ".."])
def test_the_base_models_folder_is_never_written(place: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "model" / "base")
    before = contents(base)
    with pytest.raises(LoadingError, match="which stays as it is"):
        edited(base).save_pretrained(str(base / place))
    assert contents(base) == before


def test_weights_that_are_no_tensor_of_their_own_in_the_files_are_written_anew(tmp_path: Path) -> None:
    """Here: the file changed after it was loaded, so that the numbers are found nowhere in it."""
    base = base_of(tmp_path / "base", max_shard_size="6KB")
    editor = edited(base)
    for file in base.glob("*.safetensors"):
        save_file({n: t + 1 for n, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(edited_folder.NotStoredAlone):
        edited_folder.write_edited_folder(
            base, tmp_path / "no", {LLAMA_SITE: (editor.sites[0].original, editor.sites[0].weight)}
        )
    assert not (tmp_path / "no").exists()
    editor.save_pretrained(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, parameter in editor.model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
