"""Refusing to continue a run with something that is not the same run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stableedit_pl.sites import Site


class IncompatibleCheckpoint(ValueError):
    """A checkpoint of another model, method or stream; the message is a table of what differs."""


def refuse_differences(source: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compare what a checkpoint was made with and what it is loaded into.

    Args:
        source: what holds the old values, for the message.
        old: name to value as stored.
        new: name to value now.

    Raises:
        IncompatibleCheckpoint: listing every name whose values differ.
    """
    names = [*old, *(name for name in new if name not in old)]
    rows = [(name, str(old.get(name)), str(new.get(name))) for name in names if old.get(name) != new.get(name)]
    if not rows:
        return
    table = [("setting", f"in {source}", "now"), *rows]
    widths = [max(len(row[column][:60]) for row in table) for column in range(3)]
    lines = ["  " + "  ".join(cell[:60].ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    raise IncompatibleCheckpoint(
        f"{source} belongs to another run:\n"
        + "\n".join(line.rstrip() for line in lines)
        + "\nGo on with the old settings, or start a new run in another run_dir without --ckpt_path."
    )


def base_model_digest(config: Any, sites: Sequence[Site]) -> str:
    """SHA-256 of the base model's configuration and of the sites' original weights, in hex."""
    digest = hashlib.sha256()
    config = config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for site in sites:
        digest.update(f"{site.name} {list(site.original.shape)} {site.original.dtype}".encode())
        digest.update(site.original.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
