"""Telling a whole checkpoint file from a damaged one.

``torch.save`` writes a zip archive. :func:`seal` appends a digest of the whole file as the archive's comment, which
any zip reader accepts and which cannot get separated from the file. Without a seal (a file written by the stock
trainer) the checksums of the archive's entries have to do. ``torch.load`` itself looks at neither, and returns a
flipped byte as it is.
"""

import hashlib
import zipfile
from pathlib import Path
from typing import IO

_END = b"PK\x05\x06"
_END_BYTES = 22
_SEAL_BYTES = 64
_CHUNK = 1 << 20


def seal(file: IO[bytes]) -> None:
    """Append the SHA-256 of a zip archive to it as its comment.

    Args:
        file: open for reading and writing, complete, without a comment.

    Raises:
        ValueError: if it is no zip archive without a comment.
    """
    size = file.seek(0, 2)
    file.seek(size - _END_BYTES)
    end = file.read(_END_BYTES)
    if not end.startswith(_END) or end[-2:] != b"\0\0":
        raise ValueError("only a zip archive without a comment can be sealed")
    digest = _digest(file, size - 2)
    file.seek(size - 2)
    file.write(_SEAL_BYTES.to_bytes(2, "little") + digest)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None when it is as it was written.

    Args:
        path: the file.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _SEAL_BYTES - _END_BYTES))
            tail = file.read()
            if tail.startswith(_END) and tail[20:22] == _SEAL_BYTES.to_bytes(2, "little"):
                right = _digest(file, size - _SEAL_BYTES - 2) == tail[_END_BYTES:]
                return None if right else "its content is not what was written (SHA-256)"
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        return f"it is no whole archive ({error})"
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    return None if broken is None else f"the checksum of its part {broken} is wrong"


def _digest(file: IO[bytes], length: int) -> bytes:
    """SHA-256 of the first ``length`` bytes, in hex."""
    digest, left = hashlib.sha256(), length
    file.seek(0)
    while left > 0 and (piece := file.read(min(_CHUNK, left))):
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest().encode()
