"""The schedule of turns: every row exactly once, in order, from any position."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import word_tokenizer

from stableedit_pl.data.records import EditRecord
from stableedit_pl.data.turns import Slot, TurnBuilder, TurnDataset, TurnSampler, TurnSchedule, WarmUpSettings
from stableedit_pl.model.encoding import Encoder, Encoding
from stableedit_pl.model.micro_batches import Batching

POSITIONS = ["start", "q1", "middle", "q3", "end", "none"]


def schedule(
    target: int = 33, warmup: int = 14, size: int = 8, position: str = "start", turns: int | None = None
) -> TurnSchedule:
    return TurnSchedule(target, warmup, size, WarmUpSettings(position=position, turns=turns))  # type: ignore[arg-type]


SCHEDULES = st.builds(
    schedule,
    st.integers(0, 60),
    st.integers(0, 40),
    st.integers(1, 13),
    st.sampled_from(POSITIONS),
    st.none() | st.integers(0, 6),
)


def phases(plan: TurnSchedule) -> str:
    return "".join(plan.slot(turn).phase[0] for turn in range(len(plan)))


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("start", "wweeeee"),
        ("q1", "ewweeee"),
        ("middle", "eewweee"),
        ("q3", "eeewwee"),
        ("end", "eeeeeww"),
        ("none", "eeeee"),
    ],
)
def test_where_the_warm_up_comes(position: str, expected: str) -> None:
    """33 edits in turns of 8 are 5 turns, 14 warm-up edits are 2."""
    assert phases(schedule(position=position)) == expected


@pytest.mark.parametrize("position", POSITIONS)
def test_short_last_turns_of_both_streams_are_turns(position: str) -> None:
    plan = schedule(position=position)
    slots = [plan.slot(turn) for turn in range(len(plan))]
    assert [s.rows for s in slots if s.phase == "edit"] == [
        range(0, 8),
        range(8, 16),
        range(16, 24),
        range(24, 32),
        range(32, 33),
    ]
    assert [s.rows for s in slots if s.phase == "warmup"] == ([] if position == "none" else [range(0, 8), range(8, 14)])


@given(plan=SCHEDULES)
def test_every_row_is_in_exactly_one_turn_and_in_order(plan: TurnSchedule) -> None:
    rows: dict[str, list[int]] = {"edit": [], "warmup": []}
    for turn in range(len(plan)):
        slot = plan.slot(turn)
        assert 0 < len(slot.rows) <= plan.turn_size
        rows[slot.phase].extend(slot.rows)
    assert rows["edit"] == list(range(plan.target_rows))
    settings = plan.warm_up
    wanted = 0 if settings.position == "none" else plan.warmup_rows
    if settings.turns is not None:
        wanted = min(wanted, settings.turns * plan.turn_size)
    assert rows["warmup"] == list(range(wanted))


@given(plan=SCHEDULES)
def test_the_warm_up_is_one_block_at_its_quarter(plan: TurnSchedule) -> None:
    order = phases(plan)
    block = "w" * plan.warmup_turns
    assert order.count("w") == plan.warmup_turns and block in order
    if block:
        quarter = POSITIONS.index(plan.warm_up.position)
        before = order.index("w")
        assert before <= plan.target_turns * quarter / 4 < before + 1


@given(plan=SCHEDULES)
def test_counts_before_a_turn_are_the_sums_over_its_slots(plan: TurnSchedule) -> None:
    done = {"edit": 0, "warmup": 0}
    for turn in range(len(plan) + 1):
        assert plan.target_edits_before(turn) == done["edit"]
        assert plan.warmup_edits_before(turn) == done["warmup"]
        if turn < len(plan):
            slot = plan.slot(turn)
            assert slot.rows.start == done[slot.phase]
            done[slot.phase] += len(slot.rows)


@pytest.mark.parametrize("turn", [-1, 7, 100])
def test_there_is_no_turn_outside_the_stream(turn: int) -> None:
    with pytest.raises(IndexError, match=f"turn {turn} of a stream of 7 turns"):
        schedule().slot(turn)


def test_a_limit_on_warm_up_turns_is_an_upper_bound() -> None:
    assert schedule(turns=1).warmup_turns == 1 and schedule(turns=9).warmup_turns == 2
    assert schedule(turns=0).warmup_turns == 0 and schedule(warmup=0).warmup_turns == 0


def test_a_stream_that_grew_keeps_the_turns_it_had() -> None:
    """Whole turns; a short last one fills up, which is what the digest of applied rows guards."""
    old, new = schedule(32, 14), schedule(64, 14)
    assert [old.slot(turn) for turn in range(6)] == [new.slot(turn) for turn in range(6)]


# ---- sampler and data set


@given(total=st.integers(0, 30), start=st.integers(0, 30))
def test_the_sampler_goes_on_where_the_run_is_but_counts_the_whole_stream(total: int, start: int) -> None:
    sampler = TurnSampler(total, start)
    assert list(sampler) == list(range(start, total))
    assert list(sampler) == list(range(start, total))  # and again
    assert len(sampler) == total


RECORDS = [EditRecord(f"e{i}", "w1 " * (1 + i % 3) + f"w{i}", f"w{i}", row=i + 1) for i in range(7)]
WARMUP = [EditRecord(f"u{i}", f"w{i}", f"w{i + 20}", row=i + 1) for i in range(3)]


class Counting:
    """Encodes, and remembers what."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, record: EditRecord) -> Encoding:
        self.seen.append(record.id)
        return Encoder(word_tokenizer()).encode(record.prompt, record.target)


def builder(longest_first: bool = False, **settings: object) -> TurnBuilder:
    encode = Counting()
    return TurnBuilder(
        {"edit": RECORDS, "warmup": WARMUP},
        {"edit": encode, "warmup": encode},
        Batching(1024, 2, consecutive=True),
        longest_first,
        WarmUpSettings(**settings),  # type: ignore[arg-type]
    )


def test_a_turn_holds_its_rows_in_file_order() -> None:
    turn = builder()(5, Slot("edit", range(2, 5)))
    assert [edit.record.id for edit in turn.edits] == ["e2", "e3", "e4"]
    assert (turn.index, turn.phase, turn.micro_batches) == (5, "edit", ((0, 1), (2,)))
    assert turn.update_weights and turn.normalization is None
    assert all(edit.encoding == Counting()(edit.record) for edit in turn.edits)


def test_longest_first_is_stable_and_keeps_edits_with_their_encodings() -> None:
    turn = builder(longest_first=True)(0, Slot("edit", range(7)))
    assert [edit.record.id for edit in turn.edits] == ["e2", "e5", "e1", "e4", "e0", "e3", "e6"]
    lengths = [len(edit.encoding.input_ids) for edit in turn.edits]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 3
    assert all(edit.encoding == Counting()(edit.record) for edit in turn.edits)


@pytest.mark.parametrize(("mode", "update"), [("edit", True), ("statistics_only", False)])
@pytest.mark.parametrize("normalization", [None, "standardize"])
def test_warm_up_turns_carry_how_they_are_treated(mode: str, update: bool, normalization: str | None) -> None:
    build = builder(mode=mode, normalization=normalization)
    turn = build(0, Slot("warmup", range(3)))
    assert [edit.record.id for edit in turn.edits] == ["u0", "u1", "u2"]
    assert (turn.phase, turn.update_weights, turn.normalization) == ("warmup", update, normalization)
    target = build(1, Slot("edit", range(3)))
    assert target.update_weights and target.normalization is None


def test_turns_are_encoded_when_they_are_asked_for() -> None:
    build = builder()
    dataset = TurnDataset(TurnSchedule(7, 3, 4, WarmUpSettings()), build)
    assert len(dataset) == 3 and build.encoders["edit"].seen == []  # type: ignore[attr-defined]
    assert [edit.record.id for edit in dataset[2].edits] == ["e4", "e5", "e6"]
    assert build.encoders["edit"].seen == ["e4", "e5", "e6"]  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        dataset[3]


def test_a_builder_travels_to_loader_processes() -> None:
    turn = pickle.loads(pickle.dumps(builder()))(0, Slot("edit", range(2)))
    again = pickle.loads(pickle.dumps(turn))
    assert turn.edits == again.edits == builder()(0, Slot("edit", range(2))).edits
    assert (again.index, again.phase, again.micro_batches) == (0, "edit", ((0, 1),))
