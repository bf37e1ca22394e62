"""Ctrl-C while modules are imported."""

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """Have Ctrl-C end the process without a traceback; does nothing where somebody else decides what it does."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        if ours:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # not the main thread
        ours = False
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
