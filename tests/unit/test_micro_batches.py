"""Micro-batches: every edit once, within the budget, little padding, few passes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stableedit_pl.model.micro_batches import NEGLIGIBLE, PADDING, Batching, by_length, in_order


def padded(lengths: list[int], pieces: tuple[tuple[int, ...], ...]) -> int:
    return sum(len(piece) * max(lengths[i] for i in piece) for piece in pieces)


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    tokens=st.none() | st.integers(1, 400),
    size=st.none() | st.integers(1, 20),
)
def test_every_edit_once_within_the_budget_and_with_little_padding(
    lengths: list[int], tokens: int | None, size: int | None
) -> None:
    pieces = by_length(lengths, tokens, size)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(lengths)))
    for piece in pieces:
        assert size is None or len(piece) <= size
        assert tokens is None or len(piece) == 1 or len(piece) * max(lengths[i] for i in piece) <= tokens
    real, everything = sum(lengths), padded(lengths, pieces)
    assert real >= (1 - PADDING) * everything - 1e-9 or everything - real <= NEGLIGIBLE


def test_similar_lengths_share_a_pass_and_different_ones_do_not() -> None:
    assert by_length([10, 10, 10, 10]) == ((0, 1, 2, 3),)
    assert by_length([10, 11, 10, 11]) == ((0, 2, 1, 3),)
    assert by_length([4, 90, 4, 90]) == ((0, 2), (1, 3))
    assert by_length([10, 14, 12, 11]) == ((0, 3, 2, 1),), "too few tokens to be worth a second pass"


def test_no_more_passes_than_padding_asks_for() -> None:
    """Lengths of a real stream: a hundred prompts between 8 and 24 tokens."""
    chance = random.Random(0)
    lengths = [round(chance.triangular(8, 24, 13)) for _ in range(100)]
    pieces = by_length(lengths, tokens=4096)
    distinct = len(set(lengths))
    assert 2 <= len(pieces) < distinct / 2
    fewer = by_length(lengths[:1] * 100, tokens=4096)
    assert len(fewer) == 1


def test_a_budget_is_split_evenly() -> None:
    assert [len(piece) for piece in by_length([10] * 11, tokens=100)] == [5, 6]
    assert [len(piece) for piece in by_length([10] * 3, tokens=5)] == [1, 1, 1]


def test_in_order_keeps_the_order() -> None:
    assert in_order(5, 2) == ((0, 1), (2, 3), (4,))
    assert in_order(0, 2) == by_length([]) == ()


@pytest.mark.parametrize(("consecutive", "expected"), [(True, ((0, 1), (2,))), (False, ((0, 2), (1,)))])
def test_batching_chooses_between_them(consecutive: bool, expected: object) -> None:
    assert Batching(100, 2, consecutive)([4, 90, 4]) == expected
