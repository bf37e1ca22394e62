"""Turns built while others are edited: the same turns, one ahead at most, errors in their place, no thread left."""

import threading
from collections.abc import Callable, Iterator

import pytest
from tiny import word_tokenizer

from stableedit_pl.data.loaders import OneAhead, TurnLoader, as_is
from stableedit_pl.data.records import EditRecord
from stableedit_pl.data.turns import Slot, Turn, TurnBuilder, TurnDataset, TurnSampler, TurnSchedule, WarmUpSettings
from stableedit_pl.model.encoding import Encoder, EncodingError
from stableedit_pl.model.micro_batches import Batching

RECORDS = [EditRecord(str(row), f"w{row} w1", f"w{row + 1} w2", row=row) for row in range(1, 30)]
ENCODER = Encoder(word_tokenizer())


def encode(record: EditRecord) -> object:
    return ENCODER.encode(record.prompt, record.target)


def loader(
    start: int = 0, num_workers: int = 0, wrap: Callable[[Callable[[int, Slot], Turn]], object] = as_is
) -> TurnLoader:
    schedule = TurnSchedule(len(RECORDS), 0, 4, WarmUpSettings("none"))
    build = TurnBuilder({"edit": RECORDS}, {"edit": encode}, Batching(100, 2), False, schedule.warm_up)  # type: ignore[dict-item]
    sampler = TurnSampler(len(schedule), start)
    dataset = TurnDataset(schedule, wrap(build))  # type: ignore[arg-type]
    return TurnLoader(dataset, sampler=sampler, batch_size=None, collate_fn=as_is, num_workers=num_workers)


def content(turns: Iterator[Turn]) -> list[tuple[int, list[tuple[str, tuple[int, ...]]]]]:
    return [(turn.index, [(edit.record.id, edit.encoding.input_ids) for edit in turn.edits]) for turn in turns]


def makers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "next turn"]


def wait_for_makers() -> None:
    for thread in makers():
        thread.join(10)
    assert not makers()


@pytest.mark.parametrize("start", [0, 3, 7, 8])
def test_the_same_turns_in_the_same_order_as_without_the_thread(start: int) -> None:
    plain = loader(start)
    expected = [(i, [(r.id, encode(r).input_ids) for r in RECORDS[4 * i : 4 * i + 4]]) for i in range(start, 8)]
    assert content(iter(plain)) == expected
    assert content(iter(plain)) == expected, "a second pass starts where the first did"
    assert len(plain) == 8


def test_worker_processes_need_no_thread() -> None:
    turns = iter(loader(5, num_workers=1))
    assert not isinstance(turns, OneAhead)
    assert content(turns) == content(iter(loader(5)))


def test_one_turn_is_built_ahead_in_another_thread_and_never_two() -> None:
    built: list[int] = []
    threads: set[threading.Thread] = set()

    def watched(build: Callable[[int, Slot], Turn]) -> Callable[[int, Slot], Turn]:
        def made(index: int, slot: Slot) -> Turn:
            built.append(index)
            threads.add(threading.current_thread())
            return build(index, slot)

        return made

    turns = iter(loader(wrap=watched))
    assert built == [], "nothing before it is asked for"
    for asked in range(8):
        assert next(turns).index == asked
        wait_for_makers()
        assert built == list(range(min(asked + 2, 8)))
    assert next(turns, None) is None and next(turns, None) is None
    assert threading.main_thread() not in threads


def test_the_next_item_is_made_while_the_current_one_is_used() -> None:
    """Neither side can go on without the other: it would hang, were the next one made only when asked for."""
    used, made = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        yield 0
        assert used.wait(10), "the first was not handed out before the second was made"
        made.set()
        yield 1

    ahead = OneAhead(items())
    assert next(ahead) == 0
    used.set()
    assert made.wait(10), "the second was not begun while the first was used"
    assert list(ahead) == [1]


@pytest.mark.parametrize("error", [EncodingError("does not fit"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_comes_up_at_its_own_turn_as_it_was_raised(error: BaseException) -> None:
    def failing(build: Callable[[int, Slot], Turn]) -> Callable[[int, Slot], Turn]:
        def made(index: int, slot: Slot) -> Turn:
            if index == 2:
                raise error
            return build(index, slot)

        return made

    turns = iter(loader(wrap=failing))
    assert [next(turns).index, next(turns).index] == [0, 1]
    wait_for_makers()  # turn 2 has failed by now, but nobody has asked for it
    with pytest.raises(type(error)) as raised:
        next(turns)
    assert raised.value is error
    assert not makers()


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_no_thread_outlives_a_loop_that_is_broken_off(stop: type[BaseException]) -> None:
    turns = iter(loader())
    with pytest.raises(stop):
        for turn in turns:
            if turn.index == 3:
                raise stop
    wait_for_makers()  # one that is building a turn ends with it, though ``turns`` is still there


def test_ctrl_c_while_waiting_loses_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = OneAhead(iter(range(4)))
    join, interrupts = threading.Thread.join, iter([True, False, True])

    def interrupted(thread: threading.Thread, timeout: float | None = None) -> None:
        if next(interrupts, False):
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    for first in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            next(ahead)
        if first == 0:
            assert next(ahead) == 0
    assert list(ahead) == [1, 2, 3]
