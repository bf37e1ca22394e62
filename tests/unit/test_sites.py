"""Sites: found by name, written in their own layout, restored bit for bit."""

from typing import Any

import pytest
import torch
from tiny import GPT2_SITE, LLAMA_SITE, add_dense, tiny_gpt2, tiny_llama
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stableedit_pl.model.sites import Site, SiteError, expand_ranges, resolve_sites


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama(layers=4)


def names(model: nn.Module, *patterns: str) -> list[str]:
    return [site.name for site in resolve_sites(model, patterns)]


def linear(dtype: torch.dtype = torch.float32, d_in: int = 5, d_out: int = 3) -> Site:
    torch.manual_seed(0)
    return Site("net.proj", nn.Linear(d_in, d_out).to(dtype))


def conv1d(d_in: int = 5, d_out: int = 3) -> Site:
    torch.manual_seed(0)
    return Site("net.proj", Conv1D(d_out, d_in))


def delta(site: Site, scale: float = 1.0, seed: int = 1) -> Tensor:
    return torch.randn(site.d_in, site.d_out, generator=torch.Generator().manual_seed(seed)) * scale


# ---- finding


def test_a_name_finds_its_module(llama: Any) -> None:
    (site,) = resolve_sites(llama, [LLAMA_SITE])
    assert site.name == LLAMA_SITE and site.module is llama.get_submodule(LLAMA_SITE)
    assert (site.d_in, site.d_out) == (32, 16) and not site.transposed


def test_ranges_and_globs_come_in_the_models_order_each_once(llama: Any) -> None:
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    assert names(llama, "model.layers.{0..3}.mlp.down_proj") == down
    assert names(llama, "*.down_proj") == down
    assert names(llama, "model.layers.[12].mlp.down_proj") == down[1:3]
    assert names(llama, down[3], "model.layers.{0..1}.mlp.down_proj", down[0], "*.3.mlp.down*") == [*down[:2], down[3]]
    every = [f"model.layers.2.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert names(llama, "model.layers.{2..2}.mlp.*_proj") == every


def test_a_name_is_not_a_prefix_and_case_matters(llama: Any) -> None:
    for pattern in ("model.layers.1.mlp.down", "MODEL.layers.1.mlp.down_proj", "layers.1.mlp.down_proj", ""):
        with pytest.raises(SiteError, match="matches no module"):
            resolve_sites(llama, [pattern])


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.b", ["a.b"]),
        ("a.{2..4}.b", ["a.2.b", "a.3.b", "a.4.b"]),
        ("{7..7}", ["7"]),
        ("{0..1}.x.{8..10}", ["0.x.8", "0.x.9", "0.x.10", "1.x.8", "1.x.9", "1.x.10"]),
        ("*.{1..2}.[ab]?", ["*.1.[ab]?", "*.2.[ab]?"]),
    ],
)
def test_ranges_expand(pattern: str, expanded: list[str]) -> None:
    assert expand_ranges(pattern) == expanded


@pytest.mark.parametrize("pattern", ["a.{1..}", "a.{1,2}", "a.{x..y}", "a.{1..3", "a.1..3}", "a.{1...3}", "a.{-1..2}"])
def test_a_range_that_is_not_written_as_one_is_refused(pattern: str) -> None:
    with pytest.raises(SiteError, match=r"a range is written \{first..last\}"):
        expand_ranges(pattern)


def test_a_backward_range_is_refused() -> None:
    with pytest.raises(SiteError, match=r"range \{4..2\} runs backwards"):
        expand_ranges("a.{4..2}.b")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("model.layers.{1..4}.mlp.down_proj", "which has layers 0..3. Near"),
        ("model.layers.7.mlp.*_proj", "which has layers 0..3. Near"),
        ("model.layers.7.mlp.downproj", "of this model. Near"),
        ("model.layers.{0..1}.mlp.down.{2..3}", "of this model. Near"),
    ],
)
def test_a_layer_beyond_the_model_says_which_there_are(llama: Any, pattern: str, said: str) -> None:
    with pytest.raises(SiteError) as raised:
        resolve_sites(llama, [pattern])
    assert said in str(raised.value)


def test_no_match_lists_near_ones(llama: Any) -> None:
    with pytest.raises(SiteError) as raised:
        resolve_sites(llama, ["model.layers.1.mlp.down_porj"])
    message = str(raised.value)
    assert "'model.layers.1.mlp.down_porj' matches no module of this model" in message
    assert "Near matches: model.layers.1.mlp.down_proj" in message


def test_a_range_beyond_the_last_layer_names_pattern_and_layer(llama: Any) -> None:
    with pytest.raises(SiteError) as raised:
        resolve_sites(llama, ["model.layers.{3..5}.mlp.down_proj"])
    message = str(raised.value)
    assert "'model.layers.4.mlp.down_proj' (from 'model.layers.{3..5}.mlp.down_proj') matches no module" in message
    assert "model.layers.3.mlp.down_proj" in message


def test_a_weights_name_and_a_pattern_like_nothing_get_suggestions_too(llama: Any) -> None:
    with pytest.raises(SiteError, match=f"Near matches: {LLAMA_SITE}"):
        resolve_sites(llama, [f"{LLAMA_SITE}.weight"])
    with pytest.raises(SiteError, match=r"Near matches: .*lm_head"):
        resolve_sites(llama, ["zzzzzz"])


def test_no_patterns_are_refused(llama: Any) -> None:
    with pytest.raises(SiteError, match="no sites given"):
        resolve_sites(llama, [])


# ---- what cannot be edited


class FusedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3, 2))


class Linear8bit(nn.Linear):
    """Like the layers of quantization libraries: a Linear by class, with weights that are none."""


@pytest.mark.parametrize(
    ("module", "substance"),
    [
        (nn.LayerNorm(4), ["LayerNorm with a weight [4] torch.float32", "cannot be edited"]),
        (nn.Embedding(5, 4), ["Embedding with a weight [5, 4]"]),
        (nn.ReLU(), ["is a ReLU, which cannot be edited"]),
        (FusedExperts(), ["FusedExperts with a weight [4, 3, 2]", "fused experts (3-D parameters)"]),
        (Linear8bit(4, 4), ["is a Linear8bit", "Load quantized models unquantized"]),
        (nn.Conv1d(4, 4, 1), ["is a Conv1d"]),
    ],
)
def test_other_modules_are_refused_saying_what_they_are(module: nn.Module, substance: list[str]) -> None:
    with pytest.raises(SiteError) as raised:
        Site("net.proj", module)
    assert all(text in str(raised.value) for text in ["net.proj", *substance]), raised.value


def test_an_int8_weight_is_refused() -> None:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SiteError, match=r"net.proj has a weight of dtype torch.int8, which is quantized or fused"):
        Site("net.proj", module)


def test_a_three_dimensional_weight_is_refused() -> None:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(SiteError, match="quantized or fused"):
        Site("net.proj", module)


def test_a_glob_over_other_modules_is_refused(llama: Any) -> None:
    with pytest.raises(SiteError, match=r"model.layers.1.mlp is a LlamaMLP"):
        resolve_sites(llama, ["model.layers.1.ml*"])


# ---- writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_adds_the_transpose(dtype: torch.dtype) -> None:
    site = linear(dtype)
    change, before = delta(site), site.weight.clone()
    add_dense(site, change)
    assert torch.equal(site.module.weight, before + change.T.to(dtype))
    assert (site.d_in, site.d_out) == (5, 3) and site.weight.shape == (3, 5)


def test_conv1d_adds_without_a_transpose() -> None:
    site = conv1d()
    change, before = delta(site), site.weight.clone()
    add_dense(site, change)
    assert torch.equal(site.module.weight, before + change)
    assert (site.d_in, site.d_out) == (5, 3) and site.weight.shape == (5, 3) and site.transposed


def test_the_output_moves_by_keys_times_delta_in_either_layout() -> None:
    for site in (linear(), conv1d()):
        keys, change = torch.randn(4, 5), delta(site)
        before = site.module(keys)
        add_dense(site, change)
        assert torch.allclose(site.module(keys) - before, keys @ change, atol=1e-5)


def test_linear_and_conv1d_copies_of_a_layer_stay_copies() -> None:
    one, other = linear(), conv1d()
    with torch.no_grad():
        other.module.weight.copy_(one.module.weight.T)
    for site in (one, other):
        add_dense(site, delta(site))
    assert torch.equal(one.weight.T, other.weight)


def test_a_square_conv1d_is_not_transposed() -> None:
    """A square weight hides a wrong orientation from every shape check."""
    site = Site("net.proj", Conv1D(4, 4))
    change, before = delta(site), site.weight.clone()
    add_dense(site, change)
    assert torch.equal(site.weight, before + change) and not torch.equal(site.weight, before + change.T)


def test_gpt2_sites_are_conv1d() -> None:
    (site,) = resolve_sites(tiny_gpt2(), [GPT2_SITE])
    assert (site.d_in, site.d_out) == (32, 16) and site.transposed and site.weight.shape == (32, 16)


def test_a_delta_of_the_other_orientation_is_refused() -> None:
    for site in (linear(), conv1d()):
        before = site.weight.clone()
        with pytest.raises(ValueError, match=r"update of net.proj is \[5, 3\], got \[3, 5\]"):
            add_dense(site, delta(site).T)
        assert torch.equal(site.weight, before)


# ---- precision


def drift(site: Site, turns: int = 300, size: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Weight after many small equal updates, and what it should be."""
    start = site.weight.double().clone()
    change = torch.full((site.d_in, site.d_out), size)
    for _ in range(turns):
        add_dense(site, change)
    return site.weight.double() - start, site.oriented(change).double() * turns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_master_accumulates_what_the_weights_own_dtype_loses(dtype: torch.dtype) -> None:
    alone, with_master = linear(dtype), linear(dtype)
    with torch.no_grad():
        for site in (alone, with_master):
            site.module.weight.fill_(1.0)
    with_master.use_master("cpu")
    got, wanted = drift(with_master)
    assert (got - wanted).abs().max() < torch.finfo(dtype).eps
    lost, _ = drift(alone)
    assert torch.count_nonzero(lost) == 0  # negative control: every single update is rounded away
    assert with_master.module.weight.dtype == dtype and with_master.state.dtype == torch.float32
    assert torch.equal(with_master.module.weight, with_master.state.to(dtype))


def test_float32_needs_no_master() -> None:
    site = linear()
    site.use_master("cpu")
    assert site.master is None and site.state.data_ptr() == site.module.weight.data_ptr()


def test_a_float64_model_needs_no_master() -> None:
    site = linear(torch.float64)
    with torch.no_grad():
        site.module.weight.fill_(1 / 3)
    before = site.weight.clone()
    site.use_master("cpu")
    add_dense(site, torch.zeros(site.d_in, site.d_out))
    assert torch.equal(site.weight, before)


def test_a_second_use_master_keeps_what_was_accumulated() -> None:
    site = linear(torch.bfloat16)
    site.use_master("cpu")
    add_dense(site, delta(site, 1e-5))
    state = site.state.clone()
    site.use_master("cpu")
    assert torch.equal(site.state, state) and not torch.equal(state, state.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_takes_a_weight_of_the_own_dtype(dtype: torch.dtype) -> None:
    site, state = linear(dtype), delta(linear()).T.to(dtype)
    site.load(state)
    assert torch.equal(site.weight, state) and torch.equal(site.state, state) and site.state.dtype == dtype
    site.use_master("cpu")
    assert (site.master is None) is (dtype == torch.float32)
    kept = state.clone()
    state.zero_()
    assert torch.equal(site.weight, kept) and torch.equal(site.state, kept.to(site.state.dtype))  # copies


def test_a_loaded_float32_weight_survives_a_trainer_that_makes_the_model_coarser() -> None:
    """Checkpoints are loaded before Lightning's bf16-true casts the module."""
    site = linear()
    state = torch.randn(3, 5)
    site.load(state)
    site.module.to(torch.bfloat16)
    site.use_master("cpu")
    assert torch.equal(site.state, state) and site.weight.dtype == torch.bfloat16


def test_a_loaded_float32_site_is_edited_like_one_that_was_never_saved() -> None:
    resumed, straight = linear(), linear()
    resumed.load(straight.weight.clone())
    resumed.use_master("cpu")
    for site in (resumed, straight):
        add_dense(site, delta(site))
    assert torch.equal(resumed.weight, straight.weight) and torch.equal(resumed.state, straight.state)


def test_load_takes_a_finer_weight_as_master() -> None:
    site = linear(torch.bfloat16)
    state = torch.randn(3, 5)
    site.load(state)
    assert torch.equal(site.state, state) and torch.equal(site.weight, state.bfloat16())
    site.use_master("cpu")
    assert torch.equal(site.state, state)
    resumed, straight = site, linear(torch.bfloat16)
    with torch.no_grad():
        straight.module.weight.copy_(state)
    straight.master = state.clone()
    for one in (resumed, straight):
        add_dense(one, delta(one, 1e-5))
    assert torch.equal(resumed.state, straight.state) and torch.equal(resumed.weight, straight.weight)


def test_load_replaces_a_master_that_is_already_there() -> None:
    site = linear(torch.bfloat16)
    site.use_master("cpu")
    site.load(torch.ones(3, 5, dtype=torch.bfloat16))
    add_dense(site, torch.zeros(5, 3))
    assert torch.equal(site.weight, torch.ones(3, 5, dtype=torch.bfloat16))


def test_a_loaded_master_goes_where_state_will_live() -> None:
    """Not beside the weight first: a resumed run has no room there that a new one did not need."""
    site = Site("m", nn.Linear(3, 2).bfloat16())
    site.master_device = torch.device("meta")
    site.load(torch.ones(2, 3))
    assert site.master is not None and site.master.is_meta
    assert torch.equal(site.weight, torch.ones(2, 3).bfloat16())


def test_load_refuses_another_shape() -> None:
    with pytest.raises(RuntimeError):
        linear().load(torch.ones(5, 3))


# ---- the original


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original_weight_is_the_base_and_restores_bit_for_bit(dtype: torch.dtype) -> None:
    site = linear(dtype)
    base = site.weight.clone()
    site.use_master("cpu")
    add_dense(site, delta(site, 1e-3))
    edited, state = site.weight.clone(), site.state.clone()
    assert not torch.equal(edited, base)
    with site.original_weight():
        assert torch.equal(site.module.weight, base)
    assert torch.equal(site.module.weight, edited) and torch.equal(site.state, state)
    with pytest.raises(ZeroDivisionError), site.original_weight():
        raise ZeroDivisionError
    assert torch.equal(site.module.weight, edited) and torch.equal(site.state, state)


def test_a_master_spares_the_copy_of_the_edited_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside seven sites of an 8B model every copy counts."""
    copied, clone = [], Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda self, **k: (copied.append(self.shape), clone(self, **k))[1])
    for dtype, copies in ((torch.bfloat16, 0), (torch.float32, 1)):
        site = linear(dtype)
        site.use_master("cpu")
        copied.clear()
        with site.original_weight():
            pass
        assert len(copied) == copies


def test_edits_do_not_reach_the_original() -> None:
    site = linear()
    base = site.weight.clone()
    add_dense(site, delta(site))
    assert torch.equal(site.original, base)


def test_the_parameter_object_stays_the_same() -> None:
    """An optimizer and the model hold it; replacing it would edit nothing."""
    site = linear(torch.bfloat16)
    parameter, address = site.module.weight, site.module.weight.data_ptr()
    site.use_master("cpu")
    add_dense(site, delta(site))
    site.load(torch.ones(3, 5))
    with site.original_weight():
        pass
    assert site.module.weight is parameter and parameter.data_ptr() == address


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_original_weight_works_while_validating(mode: Any) -> None:
    site = linear()
    with mode(), site.original_weight():
        site.module(torch.ones(1, 5))
    out = site.module(torch.ones(1, 5))
    out.sum().backward()
    assert site.module.weight.grad is not None


def test_a_weight_that_two_modules_share_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj = model.model.layers[1].mlp.down_proj
    with pytest.raises(SiteError, match="cannot be edited alone, its weight is tied"):
        names(model, "*.down_proj")


def test_a_tied_output_layer_is_refused() -> None:
    """Editing it would change the input embeddings as well."""
    with pytest.raises(SiteError, match=r"lm_head cannot be edited alone, its weight is tied: .*wte\.weight"):
        names(tiny_gpt2(), "lm_head")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_site_is_edited_when_its_weight_is_not_the_bases(dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    (site,) = resolve_sites(model, [LLAMA_SITE])
    assert not site.is_edited()
    model.to(torch.bfloat16)  # a trainer's precision rounds it; that is no edit
    assert not site.is_edited()
    with torch.no_grad():
        site.module.weight[0, 0] += 1.0
    assert site.is_edited()
    site.load(site.original)
    assert not site.is_edited()
