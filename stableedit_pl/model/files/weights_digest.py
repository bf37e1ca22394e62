"""A digest of all weights in a base model's files: an edit belongs to the whole model that it was made in."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from stableedit_pl.model.files.base_files import weight_files
from stableedit_pl.model.files.shards import Shard, Stored, open_shard

_AT_ONCE = 8
"""Tensors that are read at the same time; hashing takes about half a second per GB and core."""

_PIECE = 1 << 22
"""Bytes read in one go."""


def weights_digest(folder: Path) -> str | None:
    """SHA-256 over every tensor's name, type, shape and bytes, in hex; None for a folder without weights.

    It does not depend on how tensors are spread over shards, or in which form they are written.
    """
    _, files = weight_files(folder)
    if not files:
        return None
    tensors = [(shard, one) for shard in map(open_shard, files) for one in shard.tensors]
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        lines = list(pool.map(lambda found: _line(*found), tensors))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _line(shard: Shard, one: Stored) -> str:
    digest = hashlib.sha256()
    if one.place is None:
        digest.update(shard.read(one.name).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        with shard.file.open("rb") as opened:
            opened.seek(one.place[0])
            left = one.place[1] - one.place[0]
            while piece := opened.read(min(_PIECE, left)):
                digest.update(piece)
                left -= len(piece)
    return f"{one.name} {one.dtype} {list(one.shape)} {digest.hexdigest()}"
