"""Refusing another run's checkpoint or stream, naming what differs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import LLAMA_SITE, add_dense, tiny_gpt2, tiny_llama

from stableedit_pl.data.records import EditRecord
from stableedit_pl.data.stream import EditStream
from stableedit_pl.data.turns import WarmUpSettings
from stableedit_pl.errors import IncompatibleCheckpoint, refuse_differences
from stableedit_pl.model.digests import base_model_digest
from stableedit_pl.model.sites import resolve_sites

OLD = {"ridge": 10.0, "normalization": "whiten", "sites": ["a", "b"], "floor": None}


def refusal(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    with pytest.raises(IncompatibleCheckpoint) as raised:
        refuse_differences("the checkpoint", old, new)
    return str(raised.value).splitlines()


def test_equal_settings_pass_in_any_order() -> None:
    refuse_differences("the checkpoint", OLD, dict(reversed(OLD.items())))
    refuse_differences("the checkpoint", {}, {})


def test_the_message_is_a_table_of_what_differs_and_a_way_on() -> None:
    lines = refusal(OLD, OLD | {"ridge": 1.0, "normalization": "none"})
    assert lines == [
        "the checkpoint belongs to another run:",
        "  setting        in the checkpoint  now",
        "  ridge          10.0               1.0",
        "  normalization  whiten             none",
        "Go on with the old settings; or start a new run in another --run_dir, without --ckpt_path: from the base "
        "model, or from this run's weights and statistics with --fork_from RUN_DIR.",
    ]


@pytest.mark.parametrize(
    ("old", "new", "row"),
    [
        (OLD | {"extra": 1}, OLD, ["extra", "1", "None"]),
        (OLD, OLD | {"extra": 1}, ["extra", "None", "1"]),
        (OLD, OLD | {"floor": 0.0}, ["floor", "None", "0.0"]),
        (OLD, OLD | {"sites": ["b", "a"]}, ["sites", "['a',", "'b']", "['b',", "'a']"]),
    ],
)
def test_settings_that_only_one_side_has_differ(old: dict[str, Any], new: dict[str, Any], row: list[str]) -> None:
    lines = refusal(old, new)
    assert len(lines) == 4 and lines[2].split() == row


def test_long_values_that_differ_late_look_different() -> None:
    sites = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    row = refusal({"sites": sites}, {"sites": [*sites[:3], "model.layers.9.mlp.down_proj"]})[2]
    old, new = (cell for cell in row.removeprefix("  sites").split("  ") if cell)
    assert old.strip() != new.strip()


# ---- the base model


def digest(model: Any, *patterns: str) -> str:
    return base_model_digest(model.config, resolve_sites(model, patterns or [LLAMA_SITE]))


def test_one_model_has_one_digest() -> None:
    assert digest(tiny_llama()) == digest(tiny_llama()) and len(digest(tiny_llama())) == 64


def test_the_digest_sees_config_weights_sites_and_dtype() -> None:
    model = tiny_llama()
    other_config = tiny_llama()
    other_config.config.rms_norm_eps = 1e-3
    touched = tiny_llama()
    with torch.no_grad():
        touched.get_submodule(LLAMA_SITE).weight[3, 5] += 1e-6
    digests = {
        digest(model),
        digest(other_config),
        digest(touched),
        digest(tiny_llama(seed=1)),
        digest(model, "model.layers.0.mlp.down_proj"),
        digest(model, "*.down_proj"),
        digest(tiny_llama().bfloat16()),
        base_model_digest(tiny_gpt2().config, resolve_sites(tiny_gpt2(), ["transformer.h.1.mlp.c_proj"])),
    }
    assert len(digests) == 8


def test_sites_with_equal_weights_are_told_apart_by_name() -> None:
    model = tiny_llama()
    first, second = "model.layers.0.mlp.down_proj", LLAMA_SITE
    with torch.no_grad():
        model.get_submodule(second).weight.copy_(model.get_submodule(first).weight)
    assert digest(model, first) != digest(model, second)


def test_the_digest_is_of_the_base_not_of_what_edits_made_of_it() -> None:
    model = tiny_llama()
    sites = resolve_sites(model, [LLAMA_SITE])
    before = base_model_digest(model.config, sites)
    add_dense(sites[0], torch.ones(sites[0].d_in, sites[0].d_out))
    assert base_model_digest(model.config, sites) == before


def test_where_the_model_lies_and_which_library_wrote_it_are_of_no_consequence() -> None:
    model = tiny_llama()
    before = digest(model)
    model.config._name_or_path = "/elsewhere"
    model.config.transformers_version = "0.0"
    assert digest(model) == before and model.config._name_or_path == "/elsewhere"


# ---- the stream that a run began with


def stream(turns: int, target: int, warmup: int = 0, position: str = "none", first: str = "w1", size: int = 8) -> Any:
    """A stream of so many rows in turns of 8, as it is when so many turns are committed."""
    made = EditStream(path="edits.jsonl", warmup_path="warmup.jsonl" if warmup else None, turn_size=size)
    prompts = [first, *(f"w{i}" for i in range(2, target + 1))]
    made.target = [EditRecord(f"e{i}", prompt, "w0") for i, prompt in enumerate(prompts)]
    made.warmup = [EditRecord(f"u{i}", f"w{i}", "w9") for i in range(warmup)]
    made.use_warm_up(WarmUpSettings(position))  # type: ignore[arg-type]
    made.trainer = SimpleNamespace(global_step=turns, state=SimpleNamespace(fn="fit"))  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("target", [33, 32 + 8, 100])
def test_a_stream_that_grew_behind_whole_turns_goes_on(target: int) -> None:
    stream(4, target).load_state_dict(stream(4, 32).state_dict())


@pytest.mark.parametrize(
    ("now", "differs"),
    [
        ({"first": "w99"}, "digests"),
        ({"target": 31}, "digests"),
        ({"size": 16}, "turn_size"),
        ({"warmup": 8, "position": "start"}, "warm_up"),
    ],
)
def test_a_stream_whose_applied_rows_or_turns_differ_is_refused(now: dict[str, Any], differs: str) -> None:
    with pytest.raises(IncompatibleCheckpoint, match=f"the checkpoint's stream.*\n.*\n  {differs} "):
        stream(**{"turns": 4, "target": 32} | now).load_state_dict(stream(4, 32).state_dict())


def test_the_refusal_names_one_difference_only_where_there_is_one() -> None:
    with pytest.raises(IncompatibleCheckpoint) as raised:
        stream(4, 32, size=16).load_state_dict(stream(4, 32).state_dict())
    assert len(str(raised.value).splitlines()) == 4


@pytest.mark.parametrize("fn", ["validate", "test", "predict"])
def test_scoring_another_stream_is_fine(fn: str) -> None:
    other = stream(0, 5, first="w99", size=2)
    other.trainer.state.fn = fn
    other.load_state_dict(stream(4, 32).state_dict())


def test_a_stream_that_grew_into_its_short_last_turn_is_refused() -> None:
    """33 edits are 5 turns, all committed; of 40 edits the last 7 would belong to the fifth turn."""
    with pytest.raises(IncompatibleCheckpoint):
        stream(5, 40).load_state_dict(stream(5, 33).state_dict())


def test_a_warm_up_that_grew_after_it_was_used_is_refused() -> None:
    """Committed: two warm-up turns and the first of the edits; with three warm-up turns that one is still to come."""
    with pytest.raises(IncompatibleCheckpoint):
        stream(3, 32, 24, "start").load_state_dict(stream(3, 32, 16, "start").state_dict())
