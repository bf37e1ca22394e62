"""Signals set a flag; a second Ctrl-C interrupts; handlers go back to whom they belonged."""

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from stableedit_pl.run.stop_signals import StopRequested, StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    """Installed; whatever happens, the test process gets its handlers back."""
    before = {number: signal.getsignal(number) for number in StopSignals.SIGNALS}
    installed = StopSignals()
    installed.install()
    yield installed
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_only_sets_a_flag(signals: StopSignals, number: signal.Signals) -> None:
    assert signals.received is None
    signal.raise_signal(number)
    assert signals.received == number


def test_a_second_ctrl_c_stops_at_once(signals: StopSignals) -> None:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_sigterm_never_cuts_a_turn_short(signals: StopSignals) -> None:
    try:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the first Ctrl-C after it does not either
    except KeyboardInterrupt:
        pytest.fail("stopped at once")
    assert signals.received == signal.SIGINT


def test_a_second_ctrl_c_counts_although_sigterm_came_between(signals: StopSignals) -> None:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGTERM)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return
    raise AssertionError("the second Ctrl-C did not stop at once")


def test_when_all_is_saved_a_signal_stops_at_once(signals: StopSignals) -> None:
    """What is left are scores: they may take hours, and are taken again by a resumed run."""
    signals.nothing_left_to_save(7)
    with pytest.raises(StopRequested, match="SIGTERM after turn 7"):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)  # on its way out already
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_just_before_all_is_saved_is_not_lost(signals: StopSignals) -> None:
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StopRequested, match="SIGTERM after turn 7"):
        signals.nothing_left_to_save(7)


def test_slurms_warning_is_heeded_in_a_job_and_nowhere_else(
    signals: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    signals.install()
    assert signal.getsignal(signal.SIGUSR1) is before
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    signals.install()
    signal.raise_signal(signal.SIGUSR1)
    assert signals.received == signal.SIGUSR1
    signals.restore()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_handlers_go_back_to_whom_they_belonged() -> None:
    calls: list[int] = []
    before = {number: signal.getsignal(number) for number in StopSignals.SIGNALS}
    try:
        signal.signal(signal.SIGTERM, lambda number, _frame: calls.append(number))
        mine = signal.getsignal(signal.SIGTERM)
        signals = StopSignals()
        signals.install()
        assert signal.getsignal(signal.SIGTERM) != mine
        signals.restore()
        assert signal.getsignal(signal.SIGTERM) is mine and signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
        signal.raise_signal(signal.SIGTERM)
        assert calls == [signal.SIGTERM] and signals.received is None
        signals.restore()  # once more is harmless
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_restore_without_install_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    StopSignals().restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_installing_twice_still_gives_the_handlers_back(signals: StopSignals) -> None:
    signals.restore()
    before = signal.getsignal(signal.SIGTERM)
    signals.install()
    signals.install()
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_installed() -> None:
    before = {number: signal.getsignal(number) for number in StopSignals.SIGNALS}
    errors: list[BaseException] = []

    def run() -> None:
        try:
            signals = StopSignals()
            signals.install()
            signals.restore()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == [] and {number: signal.getsignal(number) for number in StopSignals.SIGNALS} == before


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_stop_says_what_and_when_and_how_to_exit(number: int, code: int, name: str) -> None:
    stop = StopRequested(number, 12)
    assert str(stop) == f"Stopped by {name} after turn 12"
    assert (stop.exit_code, stop.signum, stop.turns) == (code, number, 12)


def test_except_exception_does_not_swallow_a_stop() -> None:
    def swallow() -> Any:
        try:
            raise StopRequested(signal.SIGTERM, 1)
        except Exception:
            return "swallowed"

    with pytest.raises(StopRequested):
        swallow()
