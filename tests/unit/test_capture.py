"""Capture against the float64 oracle, whatever the micro-batches and padding; and nothing left behind."""

from typing import Any

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import GPT2_SITE, LLAMA_SITE, relative_difference, tiny_gpt2, tiny_llama, word_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stableedit_pl.model.capture import Captured, answer_loss, tapped
from stableedit_pl.model.capture import capture as capture_with
from stableedit_pl.model.encoding import Encoder, Encoding, collate
from stableedit_pl.model.micro_batches import in_order
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import Site, SiteError, resolve_sites

LLAMA_SITES = ["model.layers.0.mlp.down_proj", LLAMA_SITE]
GPT2_SITES = ["transformer.h.0.mlp.c_fc", GPT2_SITE]
EDITS = [
    ("w1 w2 w3", "w20 w21"),
    ("w4", "w22"),
    ("w5 w6 w7 w8 w9 w10", "w23 w24 w25"),
    ("w11 w12", "w20"),
    ("w13 w1 w2", "w26 w27 w28 w29"),
    ("w14 w15", "w30"),
    ("w2 w2 w2 w2", "w31 w31"),
]
TOKENIZER = word_tokenizer()
MODELS = {"llama": (tiny_llama, LLAMA_SITES), "gpt2": (tiny_gpt2, GPT2_SITES)}


def frozen(kind: str, count: int = 2) -> tuple[Any, list[Site]]:
    build, sites = MODELS[kind]
    model = build().requires_grad_(False)
    return model, resolve_sites(model, sites[-count:])


def encoded(edits: list[tuple[str, str]] = EDITS) -> list[Encoding]:
    encoder = Encoder(TOKENIZER)
    return [encoder.encode(prompt, target) for prompt, target in edits]


def capture(
    model: Any, sites: list[Site], encodings: list[Encoding], micro: int, pad: int, *reduction: Any
) -> Captured:
    """Consecutive micro-batches of ``micro`` edits, everything made and selected."""
    return capture_with(PartialForward(model), sites, encodings, in_order(len(encodings), micro), pad, *reduction)


def by_reference(model: Any, sites: list[Site], reduction: Any, micro: int) -> tuple[Any, list[float]]:
    given_edits = [ref.encode(TOKENIZER, prompt, target) for prompt, target in EDITS]
    modules = {site.name: site.module for site in sites}
    rows, losses = ref.capture(model, modules, given_edits, reduction, micro)
    return rows, [loss * ref.answer_count(labels) for loss, (_, labels) in zip(losses, given_edits, strict=True)]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize(
    ("reduction", "micro"), [("token_sum", 3), ("token_sum", 100), ("micro_batch_mean", 3), ("micro_batch_mean", 100)]
)
def test_rows_and_losses_match_the_reference(kind: str, sites: int, reduction: Any, micro: int) -> None:
    model, chosen = frozen(kind, sites)
    got = capture(model, chosen, encoded(), micro, 0, reduction)
    rows, losses = by_reference(model, chosen, reduction, micro)
    assert got.rows.keys() == rows.keys()
    for name, (keys, gradients) in rows.items():
        assert got.rows[name].keys.shape == keys.shape and got.rows[name].gradients.shape == gradients.shape
        assert relative_difference(got.rows[name].keys, keys) < 1e-5
        assert relative_difference(got.rows[name].gradients, gradients) < 1e-5
        assert got.rows[name].keys.dtype == got.rows[name].gradients.dtype == torch.float32
    assert got.losses == pytest.approx(losses, rel=1e-5)
    assert got.mean_loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_two_reductions_differ() -> None:
    """Negative control for the comparisons above."""
    model, sites = frozen("llama")
    a = capture(model, sites, encoded(), 3, 0, "token_sum").rows[LLAMA_SITE]
    b = capture(model, sites, encoded(), 3, 0, "micro_batch_mean").rows[LLAMA_SITE]
    assert torch.equal(a.keys, b.keys) and relative_difference(b.gradients, a.gradients) > 0.1


@settings(max_examples=15, deadline=None)
@given(micro=st.integers(1, 8), pad=st.sampled_from([0, 2, 63]), order=st.permutations(range(len(EDITS))))
def test_micro_batches_padding_and_order_do_not_matter(micro: int, pad: int, order: list[int]) -> None:
    model, sites = frozen("llama")
    one_by_one = [capture(model, sites, [edit], 1, 0) for edit in encoded()]
    got = capture(model, sites, [encoded()[i] for i in order], micro, pad)
    for site in sites:
        keys = torch.cat([one_by_one[i].rows[site.name].keys for i in order])
        gradients = torch.cat([one_by_one[i].rows[site.name].gradients for i in order])
        assert relative_difference(got.rows[site.name].keys, keys) < 1e-5
        assert relative_difference(got.rows[site.name].gradients, gradients) < 1e-5
    assert got.losses == pytest.approx([one_by_one[i].losses[0] for i in order], rel=1e-5)
    assert got.correct == [one_by_one[i].correct[0] for i in order]


def test_gpt2_does_not_feel_padding_either() -> None:
    """Learned positions: left padding would shift them."""
    model, sites = frozen("gpt2")
    together, alone = capture(model, sites, encoded(), 7, 63), capture(model, sites, encoded(), 1, 0)
    for site in sites:
        assert relative_difference(together.rows[site.name].gradients, alone.rows[site.name].gradients) < 1e-5


def test_rows_are_the_answer_tokens_only() -> None:
    model, sites = frozen("llama")
    got = capture(model, sites, encoded(), 2, 0)
    assert got.rows[LLAMA_SITE].keys.shape == (sum(len(target.split()) for _, target in EDITS), 32)
    assert len(got.losses) == len(got.correct) == len(EDITS)


def test_correct_is_the_fraction_of_tokens_already_predicted() -> None:
    model, sites = frozen("llama")
    prompt = [1, 5, 6, 7]
    best = [int(model(torch.tensor([prompt])).logits[0, -1].argmax())]
    best.append(int(model(torch.tensor([prompt + best])).logits[0, -1].argmax()))
    wrong = (best[1] + 1) % 60

    def edit(target: list[int]) -> Encoding:
        return Encoding((*prompt, *target[:-1]), (-100,) * (len(prompt) - 1) + tuple(target), len(prompt))

    got = capture(model, sites, [edit(best), edit([best[0], wrong]), edit([wrong])], 2, 0)
    assert got.correct[:2] == [1.0, 0.5] and got.correct[2] == float(wrong == best[0])


def test_gradients_are_those_of_a_full_backward_bit_for_bit() -> None:
    model, sites = frozen("llama")
    batch = collate(encoded(), 0)
    got = capture(model, sites, encoded(), 100, 0)
    model.requires_grad_(True)
    outputs = {}
    handles = [s.module.register_forward_hook(lambda m, i, o, n=s.name: outputs.update({n: o})) for s in sites]
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    loss = answer_loss(logits[batch.answers], batch, "token_sum")[0]
    full = torch.autograd.grad(loss, [outputs[site.name] for site in sites])
    for handle in handles:
        handle.remove()
    for site, gradient in zip(sites, full, strict=True):
        assert torch.equal(got.rows[site.name].gradients, gradient[batch.answers])


@pytest.mark.parametrize("frozen_weights", [True, False])
def test_no_parameter_gets_a_gradient_and_no_weight_changes(frozen_weights: bool) -> None:
    model, sites = frozen("llama")
    model.requires_grad_(not frozen_weights)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    capture(model, sites, encoded(), 3, 0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad is not frozen_weights for parameter in model.parameters())


def test_layers_below_the_first_site_build_no_graph() -> None:
    model, _ = frozen("llama")
    sites = resolve_sites(model, [LLAMA_SITE])
    seen: dict[str, bool] = {}
    watched = {"below": model.model.layers[0], "beside": model.model.layers[1].mlp.up_proj, "above": model.model.norm}

    def watch(name: str) -> Any:
        def hook(_m: nn.Module, _i: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen[name] = output.requires_grad

        return hook

    for name, module in watched.items():
        module.register_forward_hook(watch(name))
    capture(model, sites, encoded(), 3, 0)
    assert seen == {"below": False, "beside": False, "above": True}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_capture_works_inside_contexts_without_gradients(context: Any) -> None:
    model, sites = frozen("llama")
    expected = capture(model, sites, encoded(), 3, 0)
    with context():
        got = capture(model, sites, encoded(), 3, 0)
    assert torch.equal(got.rows[LLAMA_SITE].gradients, expected.rows[LLAMA_SITE].gradients)
    assert torch.count_nonzero(got.rows[LLAMA_SITE].gradients) > 0


def test_what_is_captured_holds_no_graph() -> None:
    model, sites = frozen("llama")
    got = capture(model, sites, encoded(), 3, 0)
    for rows in got.rows.values():
        for tensor in (rows.keys, rows.gradients):
            assert not tensor.requires_grad and tensor.grad_fn is None


def test_hooks_are_gone_afterwards() -> None:
    model, sites = frozen("llama")
    before = hooks(model)
    capture(model, sites, encoded(), 3, 0)
    assert hooks(model) == before
    with tapped(sites):
        assert hooks(model) == before + 2
    assert hooks(model) == before


def test_hooks_are_gone_after_an_exception_in_the_forward_pass() -> None:
    model, sites = frozen("llama")
    expected = capture(model, sites, encoded(), 3, 0)
    before = hooks(model)
    handle = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    with pytest.raises(MemoryError):
        capture(model, sites, encoded(), 3, 0)
    handle.remove()
    assert hooks(model) == before
    again = capture(model, sites, encoded(), 3, 0)
    assert torch.equal(again.rows[LLAMA_SITE].gradients, expected.rows[LLAMA_SITE].gradients)


def test_hooks_are_gone_when_registering_one_fails() -> None:
    model, sites = frozen("llama")
    sites[1].module.register_forward_hook = None  # type: ignore[assignment,method-assign]
    before = hooks(model)
    with pytest.raises(TypeError):
        capture(model, sites, encoded(), 3, 0)
    assert hooks(model) == before


def test_a_site_that_the_forward_pass_skips_is_named() -> None:
    model, sites = frozen("llama")
    unused = Site("model.spare.proj", nn.Linear(4, 4))
    with pytest.raises(SiteError, match=r"no input was seen at model.spare.proj: .*torch.compile drops hooks"):
        capture(model, [*sites, unused], encoded(), 3, 0)
    assert hooks(model) == 0


def test_a_site_that_only_some_micro_batches_use_is_named() -> None:
    """What an earlier micro-batch left must not stand in for it."""
    model, sites = frozen("llama")
    spare, runs = nn.Linear(16, 16), []

    def first_time_only(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return output + spare(output) if len(runs) == 1 else output

    model.model.norm.register_forward_hook(first_time_only)
    with pytest.raises(SiteError, match=r"no input was seen at spare: "):
        capture(model, [*sites, Site("spare", spare)], encoded(), 3, 0)
    assert len(runs) == 2


def test_a_site_that_runs_without_reaching_the_loss_is_an_error() -> None:
    model, sites = frozen("llama")
    spare = nn.Linear(16, 4)
    model.model.norm.register_forward_hook(
        lambda _m, _i, output: spare(output) and None if False else (spare(output), None)[1]
    )
    with pytest.raises(SiteError, match="the loss does not depend on spare"):
        capture(model, [*sites, Site("spare", spare)], encoded(), 3, 0)


def test_a_site_that_runs_twice_in_a_forward_pass_is_refused() -> None:
    """Layers that share a module: half of the keys and gradients would be missing, silently."""
    model = tiny_llama().requires_grad_(False)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    sites = [Site("shared", model.model.layers[0].mlp.down_proj)]
    with pytest.raises(SiteError, match="site shared runs twice in one forward pass"):
        capture(model, sites, encoded(), 3, 0)


def test_bfloat16_models_give_float32_rows() -> None:
    model = tiny_llama().bfloat16().requires_grad_(False)
    got = capture(model, resolve_sites(model, [LLAMA_SITE]), encoded(), 3, 0)
    assert got.rows[LLAMA_SITE].keys.dtype == got.rows[LLAMA_SITE].gradients.dtype == torch.float32


def test_the_answer_loss_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]], [[0.0, 1.0], [9.0, 0.0], [9.0, 0.0]]])
    encodings = [Encoding((0, 1, 1), (-100, 0, 0), 2), Encoding((1,), (1,), 1)]
    batch = collate(encodings, 0)
    a, b, c = (torch.log1p(torch.tensor(x).exp()).item() for x in (-2.0, 3.0, -1.0))
    logits = logits[batch.answers]
    total, losses, correct = answer_loss(logits, batch, "token_sum")
    assert total.item() == pytest.approx(a + b + c)
    assert losses.tolist() == pytest.approx([a + b, c])
    assert correct.tolist() == [0.5, 1.0]
    assert answer_loss(logits, batch, "micro_batch_mean")[0].item() == pytest.approx((a + b + c) / 3)


def test_mean_loss_is_over_edits() -> None:
    assert Captured({}, torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])).mean_loss == 3.0


# ---- sites that see all tokens in a row


class InARow(nn.Module):
    """Hands its layer all tokens of all edits in one row, or another shape, and gives its output the old one again."""

    def __init__(self, layer: nn.Linear, shape: str) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.shape == "some tokens":
            return torch.cat([self.layer(hidden[:, :2].flatten(0, 1)).unflatten(0, (-1, 2)), hidden[:, 2:, :16]], dim=1)
        if self.shape == "length first":
            return self.layer(hidden.transpose(0, 1)).transpose(0, 1)
        if self.shape == "more dimensions":
            return self.layer(hidden[:, :, None])[:, :, 0]
        return self.layer(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


def in_a_row(shape: str = "a row") -> tuple[Any, list[Site]]:
    model = tiny_llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj = InARow(layer.mlp.down_proj, shape)
    return model, resolve_sites(model, [f"model.layers.{i}.mlp.down_proj.layer" for i in (0, 1)])


@pytest.mark.parametrize("micro", [1, 3, 100])
def test_a_site_that_sees_tokens_in_a_row_gives_the_same_rows(micro: int) -> None:
    wanted = capture(*frozen("llama"), encoded(), micro, 0)
    got = capture(*in_a_row(), encoded(), micro, 0)
    for theirs, ours in zip(wanted.rows.values(), got.rows.values(), strict=True):
        assert torch.equal(theirs.keys, ours.keys) and torch.equal(theirs.gradients, ours.gradients)
    assert wanted.losses == got.losses


@pytest.mark.parametrize("shape", ["some tokens", "length first", "more dimensions"])
def test_what_cannot_be_traced_to_tokens_is_refused_in_a_sentence(shape: str) -> None:
    with pytest.raises(SiteError, match=r"down_proj.layer cannot be edited: for 3 prompts of \d+ tokens it is given"):
        capture(*in_a_row(shape), encoded(), 3, 0)


@pytest.mark.parametrize("family", ["opt", "qwen2_moe"])
def test_families_that_see_tokens_in_a_row(family: str) -> None:
    """Keys against a hook of our own, one edit at a time; value gradients change the loss as they say."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if family == "opt":
        sizes |= {"ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 16, "init_std": 0.3}
        name = "model.decoder.layers.1.fc2"
    else:
        sizes |= {"num_experts": 4, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 24}
        sizes |= {"num_key_value_heads": 1, "num_experts_per_tok": 2, "initializer_range": 0.3}
        name = "model.layers.1.mlp.shared_expert.down_proj"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, pad_token_id=0, **sizes)).eval()
    model.requires_grad_(False)
    sites = resolve_sites(model, [name])
    got = capture_with(PartialForward.tried(model, sites), sites, encoded(), in_order(len(EDITS), 3), 0)
    seen: list[torch.Tensor] = []
    handle = sites[0].module.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    for one in encoded():
        batch = collate([one], 0)
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        seen[-1] = seen[-1].reshape(-1, seen[-1].shape[-1])[batch.rows[1]]
    handle.remove()
    rows = got.rows[name]
    assert relative_difference(rows.keys, torch.cat(seen)) < 1e-5
    step = 1e-3 * rows.gradients.T @ rows.keys  # one small step of plain gradient descent on the weight
    sites[0].module.weight.data -= step
    after = capture_with(PartialForward(model), sites, encoded(), in_order(len(EDITS), 3), 0)
    foretold = 1e3 * float((step**2).sum())
    assert sum(got.losses) - sum(after.losses) == pytest.approx(foretold, rel=0.1)
