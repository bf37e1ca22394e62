"""Builds the demo: a small Llama that knows an invented world, and two streams of edits that contradict it.

    python scripts/demo/build_demo.py --out stableedit_pl/demo --seed 0

Everything follows from the seed. The script keeps to one thread, because the last digits of floating-point sums,
and with them the weights, depend on the number of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_world import CARD, Questions, edit_streams, invent_world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy, normalize
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

UNLABELLED = -100
REQUIRED = 0.99  # share of questions the saved model has to answer exactly, or the build fails


@dataclass(frozen=True)
class Recipe:
    """Sizes of the world and of the model, and how it is trained."""

    people: int = 200
    edited: int = 125
    """People in the target stream; all their facts are edited."""
    warm_up: int = 25
    """People in the warm-up stream; the rest is never edited."""
    largest_addend: int = 11
    hidden: int = 192
    intermediate: int = 3072
    """Width of the keys of the `down_proj` to edit."""
    layers: int = 2
    heads: int = 6
    batch: int = 32
    epochs: int = 14
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    separation: float = 3.0
    """Weight of the separation penalty, see `train`."""


def train_tokenizer(questions: Questions) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE on the world.

    The vocabulary is bounded only by the world: merging goes on until every word is one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<pad>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator((f"{prompt} {answer}" for prompt, answer in questions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    )


def encode(tokenizer: PreTrainedTokenizerFast, questions: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes questions, answers and the end of the sequence.

    Only the last two are labelled: nothing in a prompt can be predicted, so learning it would be wasted capacity.

    Args:
        tokenizer: the tokenizer of the demo.
        questions: what to encode.

    Returns:
        Input ids and the labels of their next tokens, both [questions, longest].
    """
    inputs, labels = [], []
    for prompt, answer in questions:
        start = tokenizer(prompt)["input_ids"]
        end = [*tokenizer(" " + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        inputs.append(start + end[:-1])
        labels.append([UNLABELLED] * (len(start) - 1) + end)
    longest = max(map(len, inputs))
    return (
        torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in inputs]),
        torch.tensor([row + [UNLABELLED] * (longest - len(row)) for row in labels]),
    )


def new_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """Returns an untrained Llama of the recipe's sizes for the tokenizer's vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


@contextmanager
def last_keys(model: LlamaForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Yields a list whose only entry is the latest input [batch, length, intermediate] of the last `down_proj`."""
    keys: list[torch.Tensor] = []
    site = model.model.layers[-1].mlp.down_proj
    handle = site.register_forward_pre_hook(lambda _, inputs: keys.__setitem__(slice(None), inputs))
    try:
        yield keys
    finally:
        handle.remove()


def overlap(keys: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Returns the mean squared cosine between keys [N, intermediate] whose answers [N] differ."""
    directions = normalize(keys.float(), dim=1)
    return (directions @ directions.T)[answers[:, None] != answers].square().mean()


def train(model: LlamaForCausalLM, inputs: torch.Tensor, labels: torch.Tensor, recipe: Recipe) -> None:
    """Trains the model in place: AdamW under bfloat16 autocast, one cycle of the learning rate.

    Besides the cross-entropy of the answers, the *separation penalty* keeps the last layer's keys of different
    facts apart. A large model has thousands of dimensions to tell its facts apart; a model this small, left alone,
    squeezes them into a few dozen directions, and no editor could change one fact without moving the others.

    Args:
        model: the model.
        inputs: from `encode`.
        labels: from `encode`.
        recipe: how to train.
    """
    steps = recipe.epochs * math.ceil(len(inputs) / recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = OneCycleLR(optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    with last_keys(model) as keys, tqdm(total=steps, desc="training", unit="step", mininterval=1) as bar:
        for _ in range(recipe.epochs):
            for rows in torch.randperm(len(inputs)).split(recipe.batch):
                length = int((inputs[rows] != model.config.pad_token_id).sum(1).max())
                ids, wanted = inputs[rows, :length], labels[rows, :length]
                labelled = wanted != UNLABELLED
                answer = labelled & (wanted != model.config.eos_token_id)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[labelled])
                loss = cross_entropy(logits.float(), wanted[labelled])
                mixing = overlap(keys[0][answer], wanted[answer])
                (loss + recipe.separation * mixing).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.set_postfix(loss=f"{loss.item():.4f}", overlap=f"{mixing.item():.4f}", refresh=False)
                bar.update()


@torch.no_grad()
def exact_match(folder: Path, questions: Questions, dtype: torch.dtype) -> float:
    """Returns the share of questions the saved model answers exactly by greedy decoding, its ending included.

    One pass with the answers in place decides it: greedy decoding gives the answer if and only if each of its
    tokens is the likeliest after those before it.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    inputs, labels = encode(AutoTokenizer.from_pretrained(folder), questions)
    right = 0
    for ids, wanted in zip(inputs.split(256), labels.split(256), strict=True):
        likeliest = model(input_ids=ids).logits.argmax(-1)
        right += int(((likeliest == wanted) | (wanted == UNLABELLED)).all(1).sum())
    return right / len(inputs)


def build(out: Path, seed: int, recipe: Recipe) -> float:
    """Builds the demo.

    Args:
        out: folder to write to; files of the same names are replaced.
        seed: decides the world, the initial weights, the order of training and the streams.
        recipe: sizes and training.

    Returns:
        The lowest exact match measured.
    """
    started = time.monotonic()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    world = invent_world(rng, recipe.people, recipe.largest_addend)
    tokenizer = train_tokenizer(world.questions())
    model = new_model(tokenizer, recipe)
    # Each sum has one phrasing, each fact three: thrice, a sum is seen as often as a fact.
    train(model, *encode(tokenizer, world.questions() + 2 * world.sums), recipe)
    model.to(torch.bfloat16).save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    streams = edit_streams(world, rng, {"edits": recipe.edited, "warmup": recipe.warm_up})
    for name, rows in streams.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    taught = {"facts, in every phrasing": world.questions()[: -len(world.sums)], "sums": world.sums}
    scores = {
        (name, dtype): exact_match(out / "model", questions, getattr(torch, dtype))
        for name, questions in taught.items()
        for dtype in ("bfloat16", "float32")
    }
    card = CARD.format(
        seed=seed,
        recipe=recipe,
        facts=len(world.facts),
        sums=len(world.sums),
        model=model,
        parameters=model.num_parameters(),
        edits=len(streams["edits"]),
        warmup=len(streams["warmup"]),
        scores="\n".join(f"| {name} | {dtype} | {score:.4f} |" for (name, dtype), score in scores.items()),
        minutes=(time.monotonic() - started) / 60,
    )
    (out / "README.md").write_text(card)
    print(card)
    return min(scores.values())


def main() -> None:
    """Reads the command line and builds the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("stableedit_pl/demo"), help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="decides everything that is random")
    args = parser.parse_args()
    score = build(args.out, args.seed, Recipe())
    if score < REQUIRED:
        sys.exit(f"The model does not know its world: exact match {score:.4f}, required {REQUIRED}.")


if __name__ == "__main__":
    main()
