"""What a checkpoint holds of an editor: the edited sites' weights and the moments, under fixed names."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from stableedit_pl.errors import GO_ON, IncompatibleCheckpoint, refuse_differences
from stableedit_pl.method.statistics import LNStatistics
from stableedit_pl.model.sites import Site

STATISTICS = "statistics/"


def weight_name(site: Site) -> str:
    """Name of a site's weight in a checkpoint: its full name in the base model, prefixed by ``model.``."""
    return f"model.{site.name}.weight"


def saved_tensors(sites: Sequence[Site], statistics: LNStatistics) -> dict[str, Tensor]:
    """The weights at the precision in which edits accumulate, and the moments (``statistics/...``); nothing else.

    A weight that ranks divide is put together on the CPU of rank 0, one after another, and left out on the other ranks.
    """
    whole = {weight_name(site): site.shard.gathered(site.state.detach()) for site in sites}
    weights = {name: weight for name, weight in whole.items() if weight is not None}
    return weights | {f"{STATISTICS}{name}": value for name, value in statistics.tensors().items()}


def load_tensors(sites: Sequence[Site], statistics: LNStatistics, tensors: Mapping[str, Any]) -> LNStatistics:
    """Write saved weights into the sites; everything is checked before the first is written.

    Args:
        sites: the sites of this run.
        statistics: the layout that the saved moments must have.
        tensors: from :func:`saved_tensors`.

    Returns:
        The saved statistics.

    Raises:
        IncompatibleCheckpoint: if names or shapes differ; the message lists them.
    """
    weights = {weight_name(site): site for site in sites}
    missing = [name for name in weights if name not in tensors]
    extra = [name for name in tensors if name not in weights and not name.startswith(STATISTICS)]
    if missing or extra:
        raise IncompatibleCheckpoint(
            f"the checkpoint does not hold this run's sites; missing: {missing}; unexpected: {extra}"
        )
    saved = {name.removeprefix(STATISTICS): t for name, t in tensors.items() if name.startswith(STATISTICS)}
    loaded = statistics.loaded(saved, "the checkpoint")
    for name, site in weights.items():
        if tensors[name].shape != site.shard.shape:
            raise IncompatibleCheckpoint(
                f"{name}: {list(tensors[name].shape)} in the checkpoint, {list(site.shard.shape)} here"
            )
    for name, site in weights.items():
        site.load(tensors[name])
    return loaded


def stored_identity(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to: ``fingerprint`` and ``committed_turns``.

    Raises:
        IncompatibleCheckpoint: if it says nothing, so that it is not one of ours.
    """
    identity = checkpoint.get("stableedit")
    if identity is None:
        raise IncompatibleCheckpoint("this checkpoint was not written by stableedit_pl: it says nothing of its run")
    return dict(identity)


def refuse_other_run(
    source: str,
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
    only: Sequence[str] | None = None,
    remedy: str = GO_ON,
) -> None:
    """Hold what a checkpoint says of its run against the run that loads it.

    Args:
        source: what holds the checkpoint, for the message.
        stored: its :func:`stored_identity`.
        now: ``fingerprint`` and ``base_commit`` of the run that loads it, and ``precision`` where it matters.
        only: names of the fingerprint that must agree; None for all.
        remedy: what to do about it.

    Raises:
        IncompatibleCheckpoint: listing what differs; where it is the base model's weights, with the hub's commits.
    """
    theirs, ours = dict(stored["fingerprint"]), dict(now["fingerprint"])
    if theirs.get("base_weights") is None or ours["base_weights"] is None:
        # Checkpoints of before hold a digest of the configuration and of the edited weights alone.
        theirs.pop("base_weights", None)
        ours.pop("base_weights")
    if theirs["sites"] != ours["sites"]:
        theirs["base_model"] = ours["base_model"]  # a digest that depends on the sites
    if "precision" in now:
        theirs["precision"], ours["precision"] = stored["precision"], now["precision"]
    if only is not None:
        theirs, ours = ({name: value for name, value in names.items() if name in only} for names in (theirs, ours))
    try:
        refuse_differences(source, theirs, ours, remedy)
    except IncompatibleCheckpoint as error:
        old, new = stored.get("base_commit"), now["base_commit"]
        if theirs.get("base_weights") == ours.get("base_weights"):
            raise
        commits = f" It was commit {old} of the hub's repository, and is {new} now." if old or new else ""
        raise IncompatibleCheckpoint(
            f"{error}\nbase_weights is a digest of all weights of base_model: the model under that name is another one "
            f"now.{commits} Give the one that the run began with (of a hub's repository: hf download ID --revision "
            "COMMIT --local-dir FOLDER, and FOLDER as base_model)."
        ) from error
