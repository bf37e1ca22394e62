"""The oracle itself is held against theory, finite differences and second derivations of each equation."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools

import reference as ref
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

VOCABULARY = 40
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64, the same quantity by two routes
SITE = "model.layers.1.mlp.down_proj"
SITES = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10 w2", "w11 w12 w13", "w3", "w14 w1 w5", "w9 w10", "w2 w2 w7 w6 w1"]
TARGETS = ["w20 w21", "w22", "w23 w24 w25", "w26 w20", "w27", "w28 w29 w30", "w31", "w32 w21", "w33"]
EDITS = list(zip(PROMPTS, TARGETS, strict=True))
TURNS = [EDITS[0:3], EDITS[3:6], EDITS[6:9]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word ``w0 ... w38`` and a beginning-of-sequence token."""
    words = {"<s>": 0} | {f"w{i}": i + 1 for i in range(VOCABULARY - 1)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="w0")


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(config | changes)))


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            vocab_size=VOCABULARY,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def encode_all(tokenizer: Any, edits: list[tuple[str, str]]) -> list[ref.Encoded]:
    return [ref.encode(tokenizer, prompt, target) for prompt, target in edits]


def f64(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    """Correlated rows [n, d] off the origin; their covariance has eigenvalues from 1 to 9."""
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    scales = torch.linspace(1, 3, d, dtype=torch.float64)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return (x * scales) @ rotation + torch.arange(d, dtype=torch.float64)


def filled(keys: Tensor, gradients: Tensor) -> ref.Statistics:
    statistics = ref.Statistics(keys.shape[1], gradients.shape[1])
    statistics.add(keys, gradients)
    return statistics


def normalized(
    keys: Tensor,
    gradients: Tensor,
    normalization: str = "whiten",
    prior_strength: float = 1.0,
    eigenvalue_floor: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Normalize rows by their own statistics."""
    return ref.normalize(
        keys,
        gradients,
        filled(keys, gradients),
        normalization=normalization,
        prior_strength=prior_strength,
        eigenvalue_floor=eigenvalue_floor,
    )


# ---------------------------------------------------------------------------------------------------------- encoding


def test_encode_labels_predict_the_target(tokenizer: Any) -> None:
    input_ids, labels = ref.encode(tokenizer, "w1 w2", "w20 w21")
    # <s> w1 w2 w20 | the label at w2 is w20, at w20 it is w21; w21 itself is never an input.
    assert input_ids == [0, 2, 3, 21]
    assert labels == [-100, -100, 21, 22]


class RenamedTokenizer:
    """A tokenizer that calls one of its tokens the bare space mark."""

    def __init__(self, tokenizer: Any, space: str) -> None:
        self.tokenizer, self.space = tokenizer, space

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def convert_ids_to_tokens(self, token_id: int) -> str:
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return "\u2581" if token == self.space else token


class SpaceMarkTokenizer:
    """Like sentencepiece with a dummy prefix: a target gets a bare space mark before its first word."""

    pieces = ("<s>", "\u2581", "\u2581\u2581", "\u2581a", "\u2581b", "c")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        known = {"a": [3], " b": [1, 4], " b c": [1, 4, 2, 5], " c": [2, 5], " ": [1]}
        return {"input_ids": [0] * add_special_tokens + known[text]}

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return self.pieces[token_id]


@pytest.mark.parametrize(
    ("target", "skip", "expected"),
    [
        ("b", True, ([0, 3, 1], [-100, -100, 4])),
        ("b", False, ([0, 3, 1], [-100, 1, 4])),
        ("c", True, ([0, 3, 2], [-100, -100, 5])),  # two marks in one token are just as bare
        ("b c", True, ([0, 3, 1, 4, 2], [-100, -100, 4, -100, 5])),
    ],
)
def test_encode_bare_space_is_input_but_no_answer(target: str, skip: bool, expected: ref.Encoded) -> None:
    assert ref.encode(SpaceMarkTokenizer(), "a", target, skip_bare_space=skip) == expected


def test_encode_refuses_an_edit_without_answer_tokens() -> None:
    with pytest.raises(ValueError, match="no answer token"):
        ref.encode(SpaceMarkTokenizer(), "a", "")


# ----------------------------------------------------------------------------------------------------------- capture


def loss_with_shifted_output(
    model: nn.Module, site: nn.Module, encoded: ref.Encoded, position: int, direction: Tensor
) -> float:
    """Summed loss when ``direction`` [d_out] is added to the site's output at one position."""

    def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        moved = output.clone()
        moved[0, position] += direction
        return moved

    handle = site.register_forward_hook(shift)
    try:
        with torch.no_grad():
            return ref.answer_loss(model, encoded).item()
    finally:
        handle.remove()


@pytest.mark.parametrize(("kind", "site_name"), [("llama", SITES[0]), ("gpt2", "transformer.h.0.mlp.c_proj")])
def test_captured_gradients_agree_with_finite_differences(tokenizer: Any, kind: str, site_name: str) -> None:
    model = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]()
    site = model.get_submodule(site_name)
    encoded = ref.encode(tokenizer, "w1 w2", "w20 w21 w22")
    captured, _ = ref.capture(model, {site_name: site}, [encoded], "token_sum", 1)
    _, gradients = captured[site_name]

    double, sites = ref.float64_copy(model, {site_name: site})
    answers = [position for position, label in enumerate(encoded[1]) if label != ref.IGNORED]
    step = 1e-5
    differences = torch.zeros_like(gradients)
    for row, position in enumerate(answers):
        for feature, unit in enumerate(torch.eye(gradients.shape[1], dtype=torch.float64)):
            up, down = (
                loss_with_shifted_output(double, sites[site_name], encoded, position, sign * step * unit)
                for sign in (1, -1)
            )
            differences[row, feature] = (up - down) / (2 * step)
    assert gradients.abs().max() > 1e-3
    # Only reachable because no part of the float64 model falls back to float32.
    torch.testing.assert_close(gradients, differences, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["token_sum", "micro_batch_mean"])
def test_capture_agrees_with_padded_batches(tokenizer: Any, reduction: ref.LossReduction) -> None:
    """Same rows from right-padded micro-batches and one backward pass each: how anyone would do it fast."""
    model, size = tiny_llama(), 2
    encoded = encode_all(tokenizer, EDITS[:5])
    captured, losses = ref.capture(model, {SITE: model.get_submodule(SITE)}, encoded, reduction, size)
    keys, gradients = captured[SITE]

    double, sites = ref.float64_copy(model, {SITE: model.get_submodule(SITE)})
    expected_keys, expected_gradients, expected_losses = [], [], []
    for start in range(0, len(encoded), size):
        chunk = encoded[start : start + size]
        width = max(len(ids) for ids, _ in chunk)
        ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in chunk])
        mask = torch.tensor([[1] * len(i) + [0] * (width - len(i)) for i, _ in chunk])
        labels = torch.tensor([x + [-100] * (width - len(x)) for _, x in chunk])
        with ref.recorded(sites) as (inputs, outputs), ref.Float64Throughout():
            logits = double(input_ids=ids, attention_mask=mask, use_cache=False).logits
        flat = {"token_sum": "sum", "micro_batch_mean": "mean"}[reduction]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=flat)
        (gradient,) = torch.autograd.grad(loss, [outputs[SITE]])
        expected_keys.append(inputs[SITE][labels != -100].detach())
        expected_gradients.append(gradient[labels != -100])
        for row_logits, row_labels in zip(logits.detach(), labels, strict=True):
            expected_losses.append(nn.functional.cross_entropy(row_logits, row_labels).item())
    torch.testing.assert_close(keys, torch.cat(expected_keys), **EXACT)
    torch.testing.assert_close(gradients, torch.cat(expected_gradients), **EXACT)
    assert losses == pytest.approx(expected_losses, rel=1e-12)


def test_capture_token_sum_ignores_micro_batches_and_the_mean_does_not(tokenizer: Any) -> None:
    model = tiny_llama()
    encoded = encode_all(tokenizer, EDITS[:3])

    def gradients(reduction: ref.LossReduction, size: int) -> Tensor:
        return ref.capture(model, {SITE: model.get_submodule(SITE)}, encoded, reduction, size)[0][SITE][1]

    assert torch.equal(gradients("token_sum", 1), gradients("token_sum", 3))
    counts = torch.tensor([2] * 2 + [1] + [3] * 3)[:, None]  # each row's edit has so many answer tokens
    torch.testing.assert_close(gradients("micro_batch_mean", 1), gradients("token_sum", 1) / counts, **EXACT)
    torch.testing.assert_close(gradients("micro_batch_mean", 3), gradients("token_sum", 1) / 6, **EXACT)


def test_capture_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    model = tiny_llama().bfloat16().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured, _ = ref.capture(
        model, {SITE: model.get_submodule(SITE)}, encode_all(tokenizer, EDITS[:2]), "token_sum", 1
    )
    assert captured[SITE][0].dtype == captured[SITE][1].dtype == torch.float64
    assert model.training and not any(module._forward_hooks for module in model.modules())
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == torch.bfloat16
        for name, tensor in model.state_dict().items()
    )


# ----------------------------------------------------------------------------------------------------------- moments


def test_moments_equal_the_streaming_recursion() -> None:
    keys, gradients = rows(57, 5, seed=1), rows(57, 4, seed=2)
    statistics = ref.Statistics(5, 4)
    n, means, scatters = 0, [torch.zeros(5).double(), torch.zeros(4).double()], [torch.zeros(5, 5), torch.zeros(4, 4)]
    for turn_keys, turn_gradients in zip(keys.split([1, 20, 3, 33]), gradients.split([1, 20, 3, 33]), strict=True):
        statistics.add(turn_keys, turn_gradients)
        m = len(turn_keys)
        for index, batch in enumerate((turn_keys, turn_gradients)):
            v = batch.mean(0)
            s = (batch - v).T @ (batch - v)
            shift = v - means[index]
            scatters[index] = scatters[index] + s + n * m / (n + m) * torch.outer(shift, shift)
            means[index] = means[index] + m * shift / (n + m)
        n += m
        for moments, mean, scatter in (
            (statistics.key_moments(), means[0], scatters[0].diagonal()),
            (statistics.gradient_moments(), means[1], scatters[1]),
        ):
            assert moments.count == n
            torch.testing.assert_close(moments.mean, mean, **EXACT)
            torch.testing.assert_close(moments.scatter, scatter.double(), **EXACT)


def test_identical_rows_have_exactly_no_scatter() -> None:
    for n in range(2, 20):
        same = f64(0.1, 1 / 3, 1e-5).repeat(n, 1)
        statistics = filled(same, same)
        assert statistics.gradient_moments().scatter.abs().max() == 0
        assert statistics.key_moments().scatter.abs().max() == 0


# ----------------------------------------------------------------------------------------------------- normalization


@pytest.mark.parametrize("prior_strength", [1.0, 0.0])
def test_whitened_rows_have_unit_covariance(prior_strength: float) -> None:
    d, n = 6, 50_000
    gradients = rows(n, d)
    assert (torch.cov(gradients.T) - torch.eye(d)).abs().max() > 1  # whitening has something to do
    _, gtilde = normalized(gradients, gradients, prior_strength=prior_strength)
    # The prior's p = d of n observations pull the smallest eigenvalue up by about d * mean eigenvalue / n = 5e-4.
    torch.testing.assert_close(torch.cov(gtilde.T), torch.eye(d).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(gtilde.mean(0), torch.zeros(d).double(), rtol=0, atol=1e-9)


def test_both_priors_agree_for_long_streams() -> None:
    gradients = rows(50_000, 6)
    proper, improper = (normalized(gradients, gradients, prior_strength=p)[1] for p in (1.0, 0.0))
    torch.testing.assert_close(proper, improper, rtol=1e-2, atol=1e-3)
    short = gradients[:20]
    proper, improper = (normalized(short, short, prior_strength=p)[1] for p in (1.0, 0.0))
    assert (proper - improper).abs().max() > 0.1  # and differ for short ones


def test_covariance_formulas() -> None:
    psi, n = torch.diag(f64(1, 5)), 10
    # tau = 6 / 20, p = 4
    torch.testing.assert_close(ref.gradient_covariance(psi, n, 2.0), torch.diag(f64(2.2, 6.2) / 14), **EXACT)
    torch.testing.assert_close(ref.gradient_covariance(psi, n, 0.0), torch.diag(f64(1, 5) / 7), **EXACT)


def test_inverse_root_is_the_symmetric_one() -> None:
    sigma = torch.cov(rows(100, 5).T)
    root = ref.inverse_root(sigma, 0.0)
    torch.testing.assert_close(root, root.T, **EXACT)
    torch.testing.assert_close(root @ sigma @ root, torch.eye(5).double(), **EXACT)
    assert torch.linalg.eigvalsh(root).min() > 0


def test_eigenvalues_are_clamped_from_below() -> None:
    sigma = torch.diag(f64(1e-12, 1e-3, 4.0))
    relative = f64((4.0 * ref.EPS) ** -0.5, 1e-3**-0.5, 0.5)
    torch.testing.assert_close(ref.inverse_root(sigma, 0.0).diagonal(), relative, **EXACT)
    absolute = f64(10.0, 10.0, 0.5)
    torch.testing.assert_close(ref.inverse_root(sigma, 1e-2).diagonal(), absolute, **EXACT)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_whitening_is_invariant_to_the_gradient_scale(n: int) -> None:
    keys, gradients = rows(n, 5, seed=1), rows(n, 8, seed=2)
    _, gtilde = normalized(keys, gradients)
    for scale in (1e-6, 1e5):
        torch.testing.assert_close(normalized(keys, scale * gradients)[1], gtilde, rtol=1e-6, atol=1e-9)
    # Negative control: an absolute floor ties the result to the loss scale.
    floored, floored_small = (normalized(keys, scale * gradients, eigenvalue_floor=1e-6)[1] for scale in (1.0, 1e-6))
    assert (floored - floored_small).abs().max() > 1e-2


def test_improper_prior_standardizes_until_the_estimate_exists() -> None:
    d = 4
    for n, is_whitened in ((d, False), (d + 1, False), (d + 2, True)):
        keys, gradients = rows(n, 3, seed=1), rows(n, d, seed=2)
        whitened, standardized = (normalized(keys, gradients, name, 0.0)[1] for name in ("whiten", "standardize"))
        assert torch.equal(whitened, standardized) is not is_whitened
        if is_whitened:
            root = ref.inverse_root(filled(keys, gradients).gradient_moments().scatter / 1, 0.0)
            torch.testing.assert_close(whitened, (gradients - gradients.mean(0)) @ root, rtol=1e-6, atol=1e-9)


def test_standardized_rows_have_unit_variance() -> None:
    keys, gradients = rows(30, 5, seed=1), rows(30, 4, seed=2)
    khat, gtilde = normalized(keys, gradients, "standardize")
    for standardized in (khat, gtilde):
        torch.testing.assert_close(standardized.var(0), torch.ones(standardized.shape[1]).double(), rtol=1e-5, atol=0)
    assert torch.equal(khat, normalized(keys, gradients, "whiten")[0])  # keys: the same in both methods


def test_none_leaves_rows_alone() -> None:
    keys, gradients = rows(3, 5), rows(3, 4)
    khat, gtilde = normalized(keys, gradients, "none")
    assert torch.equal(khat, keys) and torch.equal(gtilde, gradients)


@pytest.mark.parametrize("normalization", ["whiten", "standardize"])
@pytest.mark.parametrize("prior_strength", [0.0, 1.0])
def test_a_single_row_is_divided_by_its_rms(normalization: str, prior_strength: float) -> None:
    keys = f64([3.0, 0.0, 0.0, 4.0])
    khat, gtilde = normalized(keys, torch.zeros(1, 2).double(), normalization, prior_strength)
    torch.testing.assert_close(khat, keys / 2.5, **EXACT)
    assert torch.equal(gtilde, torch.zeros(1, 2).double())


@pytest.mark.parametrize("prior_strength", [0.0, 1.0])
@pytest.mark.parametrize("n", [2, 9])
def test_gradients_that_never_differ_whiten_to_zero(prior_strength: float, n: int) -> None:
    gradients = f64(0.1, 1 / 3, 1e-5).repeat(n, 1)
    assert normalized(rows(n, 4), gradients, prior_strength=prior_strength)[1].abs().max() == 0


def test_unknown_normalization_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'rotate'"):
        normalized(rows(3, 2), rows(3, 2), "rotate")


# ---------------------------------------------------------------------------------------------------------- solution


def test_targets() -> None:
    khat, gtilde = f64([1.0, 2.0], [0.0, 3.0]), f64([1.0], [-2.0])
    torch.testing.assert_close(ref.targets(khat, gtilde, 0.1), f64([-0.5], [1.8]), **EXACT)


@pytest.mark.parametrize(("n", "d_in"), [(5, 12), (12, 5), (1, 4)])
@pytest.mark.parametrize("ridge", [1e-2, 10.0])
def test_ridge_primal_dual_and_least_squares_agree(n: int, d_in: int, ridge: float) -> None:
    keys, values = rows(n, d_in, seed=1), rows(n, 3, seed=2)
    delta = ref.ridge_update(keys, values, ridge)
    primal = torch.linalg.solve(keys.T @ keys + ridge * torch.eye(d_in), keys.T @ values)
    dual = keys.T @ torch.linalg.solve(keys @ keys.T + ridge * torch.eye(n), values)
    torch.testing.assert_close(delta, primal, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(delta, dual, rtol=1e-7, atol=1e-9)
    # And it is the minimum: the objective's gradient vanishes.
    gradient = keys.T @ (keys @ delta - values) + ridge * delta
    assert gradient.abs().max() < 1e-9 * (keys.T @ values).abs().max()


def test_update_shrinks_as_ridge_grows() -> None:
    keys, values = rows(6, 10, seed=1), rows(6, 3, seed=2)
    norms = [ref.ridge_update(keys, values, ridge).norm().item() for ridge in (1e-3, 1e-1, 1e1, 1e3, 1e5)]
    assert all(larger > smaller > 0 for larger, smaller in itertools.pairwise(norms))


def test_ridge_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        ref.ridge_update(rows(2, 3), rows(2, 3), 0.0)


# -------------------------------------------------------------------------------------------------------------- runs


def edit_losses(model: nn.Module, tokenizer: Any, edits: list[tuple[str, str]]) -> Tensor:
    """Mean negative log likelihood per answer token of each edit."""
    double, _ = ref.float64_copy(model, {})
    with torch.no_grad():
        return torch.stack([ref.answer_loss(double, e) / ref.answer_count(e[1]) for e in encode_all(tokenizer, edits)])


def edited(model: nn.Module, accumulated: dict[str, Tensor]) -> nn.Module:
    """A float64 copy of the model with the updates applied."""
    double, sites = ref.float64_copy(model, {name: model.get_submodule(name) for name in accumulated})
    with torch.no_grad():
        for name, delta in accumulated.items():
            sites[name].weight += delta
    return double


@pytest.mark.parametrize(("normalization", "step_size"), [("whiten", 0.05), ("standardize", 0.05), ("none", 5.0)])
@pytest.mark.parametrize("prior_strength", [0.0, 1.0])
def test_three_turns_lower_the_loss_of_their_edits(
    tokenizer: Any, normalization: ref.Normalization, step_size: float, prior_strength: float
) -> None:
    model = tiny_llama()
    result = ref.reference_run(
        model,
        tokenizer,
        SITES,
        TURNS,
        normalization=normalization,
        step_size=step_size,
        ridge=1.0,
        prior_strength=prior_strength,
    )
    before = edit_losses(model, tokenizer, EDITS)
    after = edit_losses(edited(model, result.accumulated), tokenizer, EDITS)
    assert after.mean() < before.mean() - 0.1
    assert result.turns[0].losses == pytest.approx(before[:3].tolist(), rel=1e-9)
    assert result.turns[2].losses != pytest.approx(before[6:].tolist(), rel=1e-3)  # it sees the edited model
    assert all(delta.norm() > 0 for turn in result.turns for delta in turn.deltas.values())


@pytest.mark.parametrize("normalization", ["whiten", "standardize", "none"])
@pytest.mark.parametrize("prior_strength", [0.0, 1.0])
def test_zero_gradients_give_a_zero_update(
    tokenizer: Any, normalization: ref.Normalization, prior_strength: float
) -> None:
    for is_mute in (True, False):
        model = tiny_llama(tie_word_embeddings=False)
        if is_mute:
            nn.init.zeros_(model.lm_head.weight)  # logits are constant: nothing inside the model matters
        result = ref.reference_run(
            model, tokenizer, SITES, TURNS, normalization=normalization, prior_strength=prior_strength
        )
        for delta in result.accumulated.values():
            assert (delta.abs().max() == 0) == is_mute


def test_linear_and_conv1d_copies_of_one_layer_get_the_same_update(tokenizer: Any) -> None:
    site = "transformer.h.1.mlp.c_proj"
    with_conv, with_linear = tiny_gpt2(), tiny_gpt2()
    conv = with_linear.get_submodule(site)
    assert isinstance(conv, Conv1D)
    linear = nn.Linear(*conv.weight.shape)
    linear.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    with_linear.transformer.h[1].mlp.c_proj = linear
    first, second = (
        ref.reference_run(model, tokenizer, [site], TURNS, step_size=0.05) for model in (with_conv, with_linear)
    )
    assert first.accumulated[site].shape == (64, 16) and first.accumulated[site].norm() > 1e-3
    torch.testing.assert_close(first.accumulated[site], second.accumulated[site].T, rtol=1e-7, atol=1e-10)


def test_a_run_is_its_steps_in_order(tokenizer: Any) -> None:
    """Two turns written out by hand, moments included."""
    model = tiny_llama()
    result = ref.reference_run(model, tokenizer, [SITE], TURNS[:2], step_size=0.05, ridge=2.0)
    statistics, total = ref.Statistics(24, 16), torch.zeros(16, 24).double()
    for turn, record in zip(TURNS, result.turns, strict=False):
        current = edited(model, {SITE: total})
        captured, losses = ref.capture(
            current, {SITE: current.get_submodule(SITE)}, encode_all(tokenizer, turn), "token_sum", 7
        )
        keys, gradients = captured[SITE]
        statistics.add(keys, gradients)
        khat, gtilde = ref.normalize(
            keys, gradients, statistics, normalization="whiten", prior_strength=1.0, eigenvalue_floor=0.0
        )
        values = -0.05 * (khat**2).sum(1, keepdim=True) * gtilde
        delta = torch.linalg.solve(keys.T @ keys + 2.0 * torch.eye(24), keys.T @ values).T
        torch.testing.assert_close(record.deltas[SITE], delta, rtol=1e-7, atol=1e-10)
        assert record.losses == losses
        total = total + record.deltas[SITE]
    torch.testing.assert_close(result.accumulated[SITE], total, **EXACT)


def test_runs_count_bare_spaces_only_if_asked(tokenizer: Any) -> None:
    model, renamed = tiny_llama(), RenamedTokenizer(tokenizer, "w20")
    plain = ref.reference_run(model, tokenizer, [SITE], TURNS[:1], step_size=0.05)
    counted = ref.reference_run(model, renamed, [SITE], TURNS[:1], step_size=0.05, skip_bare_space=False)
    skipped = ref.reference_run(model, renamed, [SITE], TURNS[:1], step_size=0.05)
    assert torch.equal(counted.accumulated[SITE], plain.accumulated[SITE])
    assert skipped.turns[0].losses[0] != plain.turns[0].losses[0]  # w20 is in the first edit's target only
    assert skipped.turns[0].losses[1:] == plain.turns[0].losses[1:]


def test_order_within_a_turn_does_not_matter(tokenizer: Any) -> None:
    model = tiny_llama()
    runs = [
        ref.reference_run(model, tokenizer, SITES, turns, step_size=0.05)
        for turns in (TURNS, [turn[::-1] for turn in TURNS])
    ]
    for name in SITES:
        torch.testing.assert_close(runs[0].accumulated[name], runs[1].accumulated[name], rtol=1e-7, atol=1e-10)


def test_sorting_decides_which_edits_share_a_mean(tokenizer: Any) -> None:
    model = tiny_llama()
    turn = EDITS[:4]  # encoded lengths 5, 3, 7, 4
    by_length = [turn[i] for i in (2, 0, 3, 1)]

    def run(edits: list[tuple[str, str]], is_sorted: bool, **changes: Any) -> ref.RunResult:
        settings = {"step_size": 0.05, "loss_reduction": "micro_batch_mean", "micro_batch_size": 2} | changes
        return ref.reference_run(model, tokenizer, [SITE], [edits], sort_edits_by_length=is_sorted, **settings)

    assert torch.equal(run(turn, True).accumulated[SITE], run(by_length, False).accumulated[SITE])
    assert run(turn, True).turns[0].losses == run(by_length, False).turns[0].losses
    assert (run(turn, True).accumulated[SITE] - run(turn, False).accumulated[SITE]).norm() > 1e-3


def test_sorting_is_stable(tokenizer: Any) -> None:
    turn = [("w1 w2", "w3"), ("w4 w5 w6", "w7"), ("w8 w9", "w10"), ("w11", "w12 w13")]
    result = ref.reference_run(tiny_llama(), tokenizer, [SITE], [turn], sort_edits_by_length=True)
    losses = edit_losses(tiny_llama(), tokenizer, [turn[i] for i in (1, 0, 2, 3)])
    assert result.turns[0].losses == pytest.approx(losses.tolist(), rel=1e-12)


def test_sites_of_a_shape_share_moments_in_scope_shape(tokenizer: Any) -> None:
    model = tiny_llama()
    sites = [*SITES, "model.layers.0.mlp.up_proj"]  # the last has a shape of its own
    per_shape, per_site = (
        ref.reference_run(model, tokenizer, sites, TURNS[:1], step_size=0.05, statistics_scope=scope)
        for scope in ("shape", "site")
    )
    assert torch.equal(per_shape.accumulated[sites[2]], per_site.accumulated[sites[2]])

    captured, _ = ref.capture(
        model, {name: model.get_submodule(name) for name in SITES}, encode_all(tokenizer, TURNS[0]), "token_sum", 1
    )
    pooled = ref.Statistics(24, 16)
    for keys, gradients in reversed(captured.values()):  # all rows first, in whatever order
        pooled.add(keys, gradients)
    for name, (keys, gradients) in captured.items():
        khat, gtilde = ref.normalize(
            keys, gradients, pooled, normalization="whiten", prior_strength=1.0, eigenvalue_floor=0.0
        )
        expected = ref.ridge_update(keys, ref.targets(khat, gtilde, 0.05), 10.0).T
        torch.testing.assert_close(per_shape.accumulated[name], expected, rtol=1e-7, atol=1e-10)
        assert (per_shape.accumulated[name] - per_site.accumulated[name]).norm() > 1e-3 * expected.norm()


def test_warm_up_turns(tokenizer: Any) -> None:
    model, settings = tiny_llama(), {"step_size": 0.05}
    cold = ref.reference_run(model, tokenizer, [SITE], TURNS[1:], **settings)
    as_one = ref.reference_run(model, tokenizer, [SITE], TURNS, **settings)
    edit, statistics_only, other = (
        ref.reference_run(model, tokenizer, [SITE], TURNS[1:], warmup_turns=TURNS[:1], **settings, **mode)
        for mode in (
            {"warmup_mode": "edit"},
            {"warmup_mode": "statistics_only"},
            {"warmup_mode": "edit", "warmup_normalization": "standardize"},
        )
    )
    # Editing warm-up turns are turns like any other; only their normalization may differ.
    assert torch.equal(edit.accumulated[SITE], as_one.accumulated[SITE])
    standardized = ref.reference_run(model, tokenizer, [SITE], TURNS[:1], normalization="standardize", **settings)
    assert torch.equal(other.turns[0].deltas[SITE], standardized.turns[0].deltas[SITE])
    assert not torch.equal(other.turns[0].deltas[SITE], edit.turns[0].deltas[SITE])
    # Moments alone: no change of the weights, but of the turns to come.
    assert statistics_only.turns[0].applied[SITE].abs().max() == 0
    assert statistics_only.turns[1].losses == cold.turns[0].losses
    assert (statistics_only.accumulated[SITE] - cold.accumulated[SITE]).norm() > 1e-3
    assert [turn.is_warmup for turn in edit.turns] == [True, False, False]


def test_rounded_weights_stay_in_the_models_dtype(tokenizer: Any) -> None:
    model = tiny_llama().bfloat16()
    result = ref.reference_run(model, tokenizer, [SITE], TURNS, step_size=0.05, round_weights_to=torch.bfloat16)
    weight = model.get_submodule(SITE).weight.double()
    for turn in result.turns:
        intended = weight + turn.deltas[SITE]
        weight = weight + turn.applied[SITE]
        assert torch.equal(weight, intended.bfloat16().double())
        assert not torch.equal(turn.deltas[SITE], turn.applied[SITE])
    assert torch.equal(result.accumulated[SITE], weight - model.get_submodule(SITE).weight.double())


def test_reference_run_leaves_the_model_as_it_was(tokenizer: Any) -> None:
    model = tiny_llama()
    ref.reference_run(model, tokenizer, [SITE], TURNS[:1], step_size=0.05)
    assert all(
        torch.equal(tensor, other)
        for tensor, other in zip(model.state_dict().values(), tiny_llama().state_dict().values(), strict=True)
    )


def test_a_site_must_be_linear_or_conv1d(tokenizer: Any) -> None:
    with pytest.raises(TypeError, match="LlamaRMSNorm"):
        ref.reference_run(tiny_llama(), tokenizer, ["model.norm"], TURNS[:1])


def test_the_oracle_imports_nothing_from_the_package() -> None:
    assert "stableedit_pl" not in Path(ref.__file__).read_text(encoding="utf-8")
