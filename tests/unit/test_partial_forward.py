"""The partial forward pass gives what the plain one gives, over families, and says where it cannot."""

import logging
from typing import Any

import pytest
import torch
from tiny import LLAMA_SITE, tiny_gpt2, tiny_llama, word_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stableedit_pl.model.asking import Scorer
from stableedit_pl.model.encoding import Encoder, Encoding, collate
from stableedit_pl.model.lower_outputs import LowerOutputs
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import resolve_sites

COMMON = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64},
}
GPT = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers.2.mlp.down_proj", COMMON),
    "mistral": ("model.layers.2.mlp.down_proj", COMMON | {"sliding_window": 4}),
    "qwen2": ("model.layers.2.mlp.down_proj", COMMON),
    "qwen3": ("model.layers.2.mlp.down_proj", COMMON),
    "gpt2": ("transformer.h.2.mlp.c_proj", GPT),
    "gptj": ("transformer.h.2.mlp.fc_out", GPT | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox.layers.2.mlp.dense_4h_to_h", COMMON),
    "gemma2": ("model.layers.2.mlp.down_proj", COMMON | {"final_logit_softcapping": 0.1}),
    "granite": ("model.layers.2.mlp.down_proj", COMMON | {"logits_scaling": 3.0}),
    "opt": ("model.decoder.layers.2.fc2", COMMON | {"ffn_dim": 32, "word_embed_proj_dim": 16}),
    "bloom": ("transformer.h.2.mlp.dense_4h_to_h", COMMON | {"n_layer": 3, "n_head": 4}),
}
ENCODER = Encoder(word_tokenizer())
ENCODINGS = [
    ENCODER.encode(prompt, target)
    for prompt, target in [("w1 w2 w3", "w20 w21"), ("w4", "w22"), ("w5 w6 w7 w8 w9 w10", "w23 w24 w25"), ("w4", "w9")]
]


def family(kind: str) -> Any:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **ids, **FAMILIES[kind][1])
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_familys_logits_are_those_of_the_plain_forward_pass(kind: str) -> None:
    model = family(kind)
    way = PartialForward.tried(model, resolve_sites(model, [FAMILIES[kind][0]]))
    assert way.head is model.get_output_embeddings() and len(way.lower) == 2
    batch = collate(ENCODINGS, 0)
    full = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[batch.answers]
    logits, lower = way.logits_and_lower(batch)
    assert torch.allclose(logits, full, atol=1e-5)
    assert torch.allclose(way.logits(batch, lower), full, atol=1e-5)
    plain = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[batch.answers]
    assert torch.equal(plain, full), "the layers must be as they were"


def test_the_output_embeddings_see_answer_tokens_only() -> None:
    model = tiny_llama()
    way = PartialForward.tried(model, resolve_sites(model, [LLAMA_SITE]))
    seen: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _m, inputs, output: seen.append((inputs[0].shape, output.shape)))
    batch = collate(ENCODINGS, 0)
    way.logits(batch)
    assert seen == [((1, 7, 16), (1, 7, 64))] and batch.input_ids.numel() > 7


def test_layers_that_are_given_are_not_run() -> None:
    model = tiny_llama()
    way = PartialForward.tried(model, resolve_sites(model, [LLAMA_SITE]))
    ran: list[str] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append("below"))
    model.model.layers[1].mlp.register_forward_hook(lambda *_: ran.append("above"))
    batch = collate(ENCODINGS, 0)
    _, lower = way.logits_and_lower(batch)
    assert ran == ["below", "above"]
    way.logits(batch, lower)
    assert ran == ["below", "above", "above"]


def test_what_is_given_is_what_counts() -> None:
    """Negative control: another lower output gives other logits."""
    model = tiny_llama()
    way = PartialForward.tried(model, resolve_sites(model, [LLAMA_SITE]))
    batch = collate(ENCODINGS, 0)
    logits, lower = way.logits_and_lower(batch)
    assert lower is not None and not torch.allclose(way.logits(batch, lower + 1), logits, atol=1e-3)


@pytest.mark.parametrize("fails", [True, False])
def test_layers_are_as_before_after_a_pass_without_them(fails: bool) -> None:
    model = tiny_llama()
    way = PartialForward.tried(model, resolve_sites(model, [LLAMA_SITE]))
    model.model.layers[0].forward = before = model.model.layers[0].forward  # as a library that wraps layers leaves it
    batch = collate(ENCODINGS, 0)
    _, lower = way.logits_and_lower(batch)
    if fails:
        handle = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            way.logits(batch, lower)
        handle.remove()
    else:
        way.logits(batch, lower)
    assert model.model.layers[0].__dict__["forward"] is before
    assert "forward" not in model.model.layers[1].__dict__
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Wayward(nn.Module):
    """Looks like a language model, but mixes positions after its head and uses the embeddings above the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, **kwargs)
        tokens = self.get_input_embeddings()(input_ids).sum(dim=-1, keepdim=True)
        output.logits = output.logits.cumsum(dim=1) + tokens
        return output


def test_a_model_that_works_otherwise_is_run_in_full_and_this_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Wayward().eval().requires_grad_(False)
    with caplog.at_level(logging.INFO):
        way = PartialForward.tried(model, resolve_sites(model, ["model." + LLAMA_SITE]))
    assert way.head is None and way.lower == ()
    assert "logits of all tokens" in caplog.text and "all layers every time" in caplog.text
    batch = collate(ENCODINGS, 0)
    full = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[batch.answers]
    assert torch.equal(way.logits(batch), full)


def test_a_site_in_the_first_layer_leaves_nothing_below(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_gpt2()
    with caplog.at_level(logging.INFO):
        way = PartialForward.tried(model, resolve_sites(model, ["transformer.h.0.mlp.c_proj"]))
    assert way.lower == () and way.head is not None
    assert "logits at answer tokens only; all layers every time" in caplog.text


def test_an_edited_head_is_not_fed_in_part() -> None:
    model = tiny_llama()
    assert PartialForward.tried(model, resolve_sites(model, ["lm_head"])).head is None


# ---- outputs that are kept


def ask(way: PartialForward, lower: LowerOutputs | None, encodings: list[Encoding] = ENCODINGS) -> Any:
    return Scorer(way, "token_match", 3, 0).answers(encodings, lower)


def test_kept_outputs_change_no_answer_and_save_the_layers_below() -> None:
    model = tiny_llama()
    way = PartialForward.tried(model, resolve_sites(model, [LLAMA_SITE]))
    expected, lower = ask(way, None), LowerOutputs(1)
    ran: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1) and None)
    first, passes = ask(way, lower), len(ran)
    second = ask(way, lower, ENCODINGS[::-1])[::-1]
    assert passes > 0 and len(ran) == passes
    for answers in (first, second):
        assert [a.tokens for a in answers] == [a.tokens for a in expected]
        assert [a.loss for a in answers] == pytest.approx([a.loss for a in expected], rel=1e-5)


def test_the_bound_holds_and_what_does_not_fit_is_run_in_full() -> None:
    model = tiny_llama()
    way = PartialForward.tried(model, resolve_sites(model, [LLAMA_SITE]))
    one = len(ENCODINGS[0].input_ids) * 16 * 4
    lower = LowerOutputs(one / 1e6)
    assert (
        [a.tokens for a in ask(way, lower)] == [a.tokens for a in ask(way, None)] == [a.tokens for a in ask(way, lower)]
    )
    assert 0 < lower.bytes <= one
    nothing = LowerOutputs(0)
    ask(way, nothing)
    assert nothing.bytes == 0
