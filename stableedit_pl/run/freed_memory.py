"""Hands freed memory back to the operating system."""

import ctypes
import functools
from collections.abc import Callable


def hand_back() -> None:
    """Return freed pages of the heap; does nothing where the C library has no ``malloc_trim`` (it is glibc's).

    A turn allocates and frees arrays of many sizes. glibc keeps their pages for later, in holes that fit less and less,
    so that over days the resident size wanders upwards although nothing is held.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim  # type: ignore[no-any-return]
    except (AttributeError, OSError, TypeError):  # another C library; Windows refuses the name None
        return None
