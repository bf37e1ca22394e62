"""Dividing a model over ranks: nothing of it changes, no rank has it whole, and what cannot be divided is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import largest_bytes
from gloo_ranks import in_ranks
from tiny import (
    absolute,
    edit_rows,
    relative_difference,
    save_model,
    tiny_gpt2,
    tiny_llama,
    word_tokenizer,
    write_stream,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, MixtralConfig, Phi3Config, Qwen3Config

from stableedit_pl import LifelongEditor
from stableedit_pl.data.readers import read_records
from stableedit_pl.devices import ranks
from stableedit_pl.devices.lockstep import gathered_for_forward, in_step
from stableedit_pl.devices.sharding import ShardingError, _blocks, _tensor_parallel_styles, shard_model
from stableedit_pl.devices.weight_shards import local
from stableedit_pl.method import workspace
from stableedit_pl.method.statistics import LNStatistics
from stableedit_pl.model.capture import capture
from stableedit_pl.model.closed_form import ClosedFormEdit, EditorState, StepInput
from stableedit_pl.model.encoding import Encoder
from stableedit_pl.model.loading import load_language_model
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.shared_capture import capture_together
from stableedit_pl.model.sites import Site

SITE = "model.layers.1.mlp.down_proj"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def model_of(kind: str) -> Any:
    if kind == "gpt2":
        return tiny_gpt2()
    configurations = {
        "qwen3": Qwen3Config(**SMALL, head_dim=8),
        "phi3": Phi3Config(**SMALL, pad_token_id=0),
        "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    }
    if kind in configurations:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(configurations[kind]).eval().requires_grad_(False)
    return tiny_llama(hidden=18, intermediate=34, layers=3, kv_heads=2, head_dim=6, tied=kind == "tied llama")


def same_logits(mesh: DeviceMesh, kind: str) -> None:
    whole, model = model_of(kind), model_of(kind)
    names = {name: parameter.numel() for name, parameter in whole.named_parameters()}
    shard_model(model, mesh)
    tokens = torch.arange(3, 17).reshape(2, 7)
    with torch.no_grad():
        difference = (model(input_ids=tokens).logits - whole(input_ids=tokens).logits).abs().max()
    assert difference <= (2e-5 if mesh["tensor_parallel"].size() > 1 else 0.0)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    if mesh["data_parallel"].size() > 1:  # every number lies on one rank, or on as many as a team has
        held = {name: local(parameter).numel() for name, parameter in model.named_parameters()}
        total = sum(sum(one.values()) for one in ranks.gather(held))
        assert sum(names.values()) <= total <= mesh["tensor_parallel"].size() * sum(names.values())
        assert gathered_for_forward(model)


@pytest.mark.parametrize(
    ("data", "tensor", "kind"),
    [(2, 1, "gpt2"), (2, 1, "tied llama"), (2, 1, "mixtral"), (1, 2, "tied llama"), (2, 2, "llama")],
)
def test_a_divided_model_says_the_same(data: int, tensor: int, kind: str) -> None:
    in_ranks(data, tensor, same_logits, kind)


def same_rows(mesh: DeviceMesh, kind: str, names: list[str], stream: str) -> None:
    """Keys and value gradients of whole width and the whole turn, whoever had which edits, columns and weights."""
    encoder = Encoder(word_tokenizer())
    encodings = [encoder.encode(record.prompt, record.target) for record in read_records("edits", stream)]
    passes = ((0, 1), (2,), (3, 4, 5), (6,))
    rows = []
    for divided in (False, True):
        model = model_of(kind)
        if divided:
            shard_model(model, mesh, names)
        sites = [Site(name, model.get_submodule(name)) for name in names]
        forward = PartialForward.tried(model, sites)
        assert forward.head is not None and len(forward.lower) == len(model.model.layers) - 1
        if divided:
            captured, _ = capture_together(forward, sites, encodings, passes, 0, "token_sum")
        else:
            captured = capture(forward, sites, encodings, passes, 0, "token_sum")
        rows.append((captured.rows, captured.measured))
    (whole, losses), (together, measured) = rows
    assert relative_difference(measured, losses) < 1e-5
    for name in names:
        assert together[name].keys.shape == whole[name].keys.shape
        assert relative_difference(together[name].keys, whole[name].keys) < 1e-5, name
        assert relative_difference(together[name].gradients, whole[name].gradients) < 1e-5, name
        everywhere = ranks.gather(ranks.fingerprint(together[name].gradients))
        assert len(set(everywhere)) == 1, "the same bytes on every rank"


@pytest.mark.parametrize(
    ("data", "tensor", "kind", "names"),
    [
        (1, 2, "qwen3", ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]),
        (1, 2, "phi3", ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
        (2, 1, "phi3", ["self_attn.qkv_proj", "mlp.down_proj"]),
        (2, 2, "tied llama", ["self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"]),
        (4, 1, "llama", ["self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"]),
        (2, 1, "mixtral", ["self_attn.o_proj"]),
    ],
)
def test_every_rank_gets_the_rows_of_the_whole(
    tmp_path: Path, data: int, tensor: int, kind: str, names: list[str]
) -> None:
    last = 2 if "llama" in kind else 1
    stream = write_stream(tmp_path / "edits.jsonl", edit_rows(7))
    in_ranks(data, tensor, same_rows, kind, [f"model.layers.{last}.{name}" for name in names], stream)


def turn_of(mesh: DeviceMesh, stream: str) -> None:
    """The largest piece of memory that a turn takes, beside the size of its site."""
    workspace.BLOCK_BYTES = 2**14  # as at full size, where a block is a fraction of a site
    model = tiny_llama(hidden=64, intermediate=1024, kv_heads=2)
    whole = model.get_submodule(SITE).weight.numel() * 4
    shard_model(model, mesh, [SITE])
    sites = [Site(SITE, model.get_submodule(SITE))]
    assert sites[0].state.numel() * mesh.size() * 4 == whole
    encoder = Encoder(word_tokenizer())
    encodings = [encoder.encode(record.prompt, record.target) for record in read_records("edits", stream)]
    given: list[StepInput] = []
    step = ClosedFormEdit(sites, EditorState(LNStatistics.empty(sites, "site")), given.pop)

    def capture() -> None:
        rows, _ = capture_together(PartialForward(model), sites, encodings, ((0, 1), (2, 3), (4, 5)), 0, "token_sum")
        given.append(StepInput(rows, absolute(step_size=1e-2, ridge=1.0), True))

    taken = largest_bytes(capture)
    if gathered_for_forward(model):
        assert taken >= whole, "FSDP2 gathers a layer for its forward pass: the measure would notice a site"
    else:
        assert taken < whole / 2
    assert largest_bytes(lambda: step.step(lambda: torch.tensor(1.0))) < whole / 2
    assert step.last is not None and step.last.plan.norms[SITE] > 0


@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 1)])
def test_no_rank_ever_holds_a_whole_site_but_in_fsdps_forward(tmp_path: Path, data: int, tensor: int) -> None:
    in_ranks(data, tensor, turn_of, write_stream(tmp_path / "edits.jsonl", edit_rows(6)))


def private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def loaded(mesh: DeviceMesh, folder: str) -> None:
    before = private_bytes()
    model = load_language_model(folder)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert private_bytes() - before < size / 4, "the files are mapped, not read"
    shard_model(model, mesh)
    assert private_bytes() - before < size * 3 / 4


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="asks Linux")
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2)])
def test_no_rank_allocates_the_whole_model_while_it_loads(tmp_path: Path, data: int, tensor: int) -> None:
    folder = save_model(tmp_path, tiny_llama(hidden=512, intermediate=4096, kv_heads=2))  # 59 MB
    in_ranks(data, tensor, loaded, folder)


def different_numbers(mesh: DeviceMesh) -> None:
    """Rank 0 has five passes to run, rank 1 two, and then none at all."""
    model = model_of("llama")
    shard_model(model, mesh, [SITE])
    expected = model_of("llama")
    for own in ((5, 2), (0, 1), (0, 0)):
        with in_step(model):
            for number in range(own[ranks.rank()]):
                tokens = torch.arange(3, 6 + number).unsqueeze(0)
                with torch.no_grad():
                    got = model(input_ids=tokens).logits
                assert torch.equal(got, expected(input_ids=tokens).logits)


def test_ranks_may_run_different_numbers_of_passes() -> None:
    in_ranks(2, 1, different_numbers)


def documented(error: pytest.ExceptionInfo[Exception]) -> bool:
    """Whether docs/sharded.md quotes what was printed."""
    page = (Path(__file__).parents[2] / "docs/sharded.md").read_text()
    quoted = " ".join(line.removeprefix("> ") for line in page.splitlines()).replace("\\*", "*")
    return " ".join(str(error.value).split()) in " ".join(quoted.split())


def refusals(mesh: DeviceMesh, folder: str) -> None:
    early = LifelongEditor(folder, sites=[SITE])
    early.configure_model()
    early._device_mesh = mesh
    with pytest.raises(ShardingError, match="loaded whole before the trainer's strategy") as error:
        early.configure_model()
    assert documented(error)
    editor = LifelongEditor(folder, sites=[SITE])
    editor._device_mesh = mesh
    editor.configure_model()
    assert editor.fingerprint()["base_model"] == early.fingerprint()["base_model"]
    with pytest.raises(ShardingError, match="stableedit export --run") as error:
        editor.save_pretrained("nowhere")
    assert documented(error)


def test_a_sharded_editor_says_what_it_cannot_do(tmp_path: Path) -> None:
    in_ranks(2, 1, refusals, save_model(tmp_path, model_of("llama")))


def test_models_that_tensor_parallelism_cannot_divide() -> None:
    with pytest.raises(
        ShardingError, match=r"GPT2LMHeadModel states no tensor-parallel plan \(base_model_tp_plan"
    ) as error:
        _tensor_parallel_styles(tiny_gpt2(), 2)
    assert documented(error)
    with pytest.raises(
        ShardingError, match=r"tensor_parallel_size=2: num_key_value_heads=1 cannot be divided evenly"
    ) as error:
        _tensor_parallel_styles(tiny_llama(), 2)
    assert documented(error)
    with pytest.raises(ShardingError, match=r"layers.0.mlp.gate_proj with 33 outputs"):
        _tensor_parallel_styles(tiny_llama(kv_heads=2, intermediate=33), 2)
    with torch.device("meta"):
        experts = AutoModelForCausalLM.from_config(
            MixtralConfig(hidden_size=64, intermediate_size=16, num_hidden_layers=1, vocab_size=32)
        )
    with pytest.raises(
        ShardingError, match=r"plan asks for .*packed_colwise.*; supported are colwise, rowwise"
    ) as error:
        _tensor_parallel_styles(experts, 2)
    assert documented(error)


def test_a_model_without_known_layers_is_not_gathered_whole() -> None:
    class Plain(nn.Linear):
        _no_split_modules = None

    with pytest.raises(ShardingError, match="Plain does not say what its layers are"):
        _blocks(Plain(2, 2))
