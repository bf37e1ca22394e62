"""Refusing to continue a run with something that is not the same run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stableedit_pl import ranks
from stableedit_pl.errors import IncompatibleCheckpoint
from stableedit_pl.sites import Site


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
    differing = [name for name in names if old.get(name) != new.get(name)]
    if not differing:
        return
    table = [("setting", f"in {source}", "now")]
    table += [(name, *_where_they_differ(str(old.get(name)), str(new.get(name)))) for name in differing]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    raise IncompatibleCheckpoint(
        f"{source} belongs to another run:\n"
        + "\n".join(line.rstrip() for line in lines)
        + "\nGo on with the old settings; or start a new run in another --run_dir, without --ckpt_path: from the base "
        "model, or from this run's weights and statistics with --fork_from RUN_DIR."
    )


def stored_identity(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to: ``fingerprint`` and ``committed_turns``.

    Raises:
        IncompatibleCheckpoint: if it says nothing, so that it is not one of ours.
    """
    identity = checkpoint.get("stableedit")
    if identity is None:
        raise IncompatibleCheckpoint("this checkpoint was not written by stableedit_pl: it says nothing of its run")
    return dict(identity)


def _where_they_differ(old: str, new: str, width: int = 60) -> tuple[str, str]:
    """Both values cut to ``width`` letters, from a little before the first that differs."""
    common = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    begin = 0 if max(len(old), len(new)) <= width else max(0, common - width // 3)

    def cut(value: str) -> str:
        piece = value[begin : begin + width]
        return ("..." if begin else "") + piece + ("..." if begin + width < len(value) else "")

    return cut(old), cut(new)


def base_model_digest(config: Any, sites: Sequence[Site]) -> str:
    """SHA-256 of the base model's configuration and of the sites' whole original weights, in hex.

    Rank 0 takes it, site by site, where ranks divide them: it does not depend on how.
    """
    digest = hashlib.sha256()
    config = config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for site in sites:
        digest.update(f"{site.name} {list(site.shard.shape)} {site.original.dtype}".encode())
        whole = site.shard.gathered(site.original)
        if whole is not None:
            digest.update(whole.contiguous().view(torch.uint8).numpy().tobytes())
    return ranks.broadcast(digest.hexdigest()) if any(site.shard.sharded for site in sites) else digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how a tokenizer cuts text, in hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return hashlib.sha256(rules.encode()).hexdigest()
