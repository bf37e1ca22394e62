"""Tiny random models, tokenizers and streams that tests build for themselves; nothing is downloaded."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stableedit_pl.method.ridge import SiteUpdate
from stableedit_pl.method.settings import MethodSettings
from stableedit_pl.method.workspace import Workspace, workspace_sizes
from stableedit_pl.model.sites import Site

WORDS = [f"w{i}" for i in range(60)]
LLAMA_SITE = "model.layers.1.mlp.down_proj"
GPT2_SITE = "transformer.h.1.mlp.c_proj"


def absolute(
    normalization: Any = "whiten", step_size: float = 1e-6, ridge: float = 10.0, *args: Any, **others: Any
) -> MethodSettings:
    """A method whose step and ridge are numbers already: it needs no turn to find them, nor a site's outputs."""
    return MethodSettings(normalization, step_size, ridge, *args, **others)


def word_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """One token a word; ``<s>`` begins every prompt."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def tiny_llama(
    seed: int = 0,
    hidden: int = 16,
    layers: int = 2,
    intermediate: int = 32,
    vocab: int = len(WORDS) + 4,
    kv_heads: int = 1,
    head_dim: int | None = None,
    tied: bool = False,
) -> LlamaForCausalLM:
    """A random Llama in float32 and eval mode."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(
    seed: int = 0, hidden: int = 16, layers: int = 2, intermediate: int = 32, vocab: int = len(WORDS) + 4
) -> GPT2LMHeadModel:
    """A random GPT-2 (``Conv1D`` sites) in float32 and eval mode."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=hidden,
        n_inner=intermediate,
        n_layer=layers,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config).eval()


def save_model(folder: Path, model: Any, tokenizer: Any | None = None) -> str:
    """Write a Hugging Face folder; returns its path."""
    model.save_pretrained(folder)
    (tokenizer or word_tokenizer()).save_pretrained(folder)
    return str(folder)


def edit_rows(count: int, seed: int = 0, locality: bool = True) -> list[dict[str, Any]]:
    """Edits of one to three words' prompts, of different lengths, with one- and two-word targets."""
    generator = torch.Generator().manual_seed(seed)

    def words(n: int) -> str:
        return " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (n,), generator=generator))

    rows = []
    for i in range(count):
        row: dict[str, Any] = {"id": f"e{seed}-{i}", "prompt": words(2 + i % 4), "target": words(1 + i % 2)}
        row["rephrases"] = [words(3), words(4)]
        if locality:
            row["locality"] = [{"prompt": words(2), "target": words(1)}]
        rows.append(row)
    return rows


def write_stream(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows as JSONL; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def add_dense(site: Site, delta: torch.Tensor) -> None:
    """Add a dense ``Delta [d_in, d_out]`` to a site: as factors, one of which is the identity."""
    update = site.placed(SiteUpdate(torch.eye(len(delta)), delta.double()))
    site.add(update, Workspace(site.state.device, *workspace_sizes(site.state.shape, len(delta))))


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """``||a - b|| / ||b||`` in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())
