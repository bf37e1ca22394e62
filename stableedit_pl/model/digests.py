"""Digests of a base model and of its tokenizer: a run goes on only with the ones that it began with."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch

from stableedit_pl.devices import ranks
from stableedit_pl.model.files.base_files import folder_at_hand, resolve_base_model
from stableedit_pl.model.files.weights_digest import weights_digest
from stableedit_pl.model.sites import Site


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


def base_weights_digest(base_model: str, commit: str | None) -> str | None:
    """SHA-256 of all weights in the base model's files, in hex; None where they hold none.

    Rank 0 takes it: ranks of one machine would read the same files at the same time.

    Args:
        base_model: folder, hub id or ``demo``.
        commit: of the hub's repository, as it was loaded.
    """
    digest = None
    if ranks.rank() == 0 and (folder := folder_at_hand(resolve_base_model(base_model), commit)) is not None:
        digest = weights_digest(folder)
    return ranks.broadcast(digest) if ranks.world() > 1 else digest


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of everything that decides how a tokenizer cuts text, in hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return hashlib.sha256(rules.encode()).hexdigest()
