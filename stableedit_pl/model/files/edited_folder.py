"""The folder that holds an edited model: the base model's files, byte for byte, with the edited tensors exchanged.

Nothing is serialized anew, so that whatever reads the base model reads this: other versions of transformers, inference
servers, processors. Shards keep their names, their layout and their dtype.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from difflib import SequenceMatcher
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stableedit_pl.errors import LoadingError
from stableedit_pl.model.files.base_files import stated_config, weight_files
from stableedit_pl.model.files.shards import Shard, Wanted, open_shard

CARD = "README.md"
BASE_CARD = "README_base_model.md"
"""What the base model's own card is called in the folder: its licence and its words stay, and say whose they are."""

_WEIGHTS = frozenset(
    [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".ggml", ".onnx", ".onnx_data"]
)
"""Files of other formats hold the unedited weights once more; whoever read those would not see the edits."""

_STALE = ("model*.safetensors", "pytorch_model*.bin", "*.index.json", "adapter_*")
"""What an earlier export may have left in the folder, and loaders would read before, or over, the new weights."""


class NotStoredAlone(LookupError):
    """An edited weight that is no tensor of its own in the base model's files."""


def write_edited_folder(
    base: Path,
    folder: Path,
    edited: Mapping[str, tuple[Tensor, Tensor]],
    dtype: torch.dtype | None = None,
    wanted: Wanted = lambda _name: None,
) -> list[str]:
    """Write the base model's files with some tensors exchanged.

    Args:
        base: the base model's folder.
        folder: where to write; made if absent.
        edited: name in the model to the weight as it was loaded and as it is now, both on the CPU.
        dtype: what the configuration is to state; None for what it states.
        wanted: what floating-point tensors are written in.

    Returns:
        Files of the base folder that were left out, because they hold its weights in another form.

    Raises:
        LoadingError: if the folder is the base model's own, or that has no weights.
        NotStoredAlone: if the files hold an edited weight under no name; nothing is written then.
    """
    refuse_base_folder(base, folder)
    index, files = weight_files(base)
    if not files:
        raise LoadingError(f"there are no weights in {base} any more: the base model's files are needed for export")
    shards = {file: open_shard(file) for file in files}
    places = _places(shards, edited)
    left_out = copy_other_files(base, folder, {*files, *index})
    changes: dict[Path, dict[str, Tensor]] = {file: {} for file in files}
    for name, (file, key) in places.items():
        changes[file][key] = edited[name][1]
    sizes = [shard.write(folder / file.relative_to(base), changes[file], wanted) for file, shard in shards.items()]
    for file in index:
        _copy_index(file, folder / file.name, sum(sizes), dtype)
    copy_config(base, folder, dtype)
    return left_out


def write_serialized_folder(base: Path, folder: Path, model: Any, dtype: torch.dtype | None) -> list[str]:
    """The same where an edited weight is only part of a tensor in the files: transformers writes the weights anew.

    Args:
        base: the base model's folder.
        folder: where to write.
        model: the edited model.
        dtype: as in :func:`write_edited_folder`.

    Returns:
        Files that were left out, because they hold the weights in another form.
    """
    refuse_base_folder(base, folder)
    index, files = weight_files(base)
    left_out = copy_other_files(base, folder, {*files, *index})
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        model.save_pretrained(beside)
        for file in [file for pattern in _STALE[:3] for file in Path(beside).glob(pattern)]:
            file.chmod(0o644)  # safetensors writes weights that only their owner can read
            file.rename(folder / file.name)
    copy_config(base, folder, dtype)
    return left_out


def refuse_base_folder(base: Path, folder: Path) -> None:
    """Hold the promise that a base model on disk is never written.

    Raises:
        LoadingError: if ``folder`` is the base model's folder, or lies in it, or the other way round.
    """
    ours, theirs = folder.resolve(), base.resolve()
    if ours == theirs or theirs in ours.parents or ours in theirs.parents:
        raise LoadingError(f"{folder} cannot be written: the base model lies in {base}, which stays as it is")


def copy_other_files(base: Path, folder: Path, weights: set[Path]) -> list[str]:
    """Copy what is neither weights nor ``config.json`` (which comes last: with it the folder is a model).

    Args:
        base: the base model's folder; links are followed.
        folder: where to write; what an earlier export left there is removed.
        weights: files of weights that are written otherwise.

    Returns:
        Files that were left out, because they hold weights in another form.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _STALE:
        for stale in folder.glob(pattern):
            stale.unlink()
    left_out = []
    for file in sorted(base.rglob("*")):
        inside = file.relative_to(base)
        hidden = any(part.startswith(".") for part in inside.parts[:-1])  # .git, .cache
        if hidden or not file.is_file() or file in weights or str(inside) == "config.json":
            continue
        if file.suffix in _WEIGHTS or file.name.endswith(".index.json"):
            left_out.append(str(inside))
            continue
        target = folder / (BASE_CARD if str(inside) == CARD else inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return left_out


def copy_config(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy ``config.json``; where it states another dtype than the weights are written in, state theirs."""
    config = dict(stated_config(base))
    changed = False
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and isinstance(part.get(key), str) and part[key] != _name(dtype):
                part[key], changed = _name(dtype), True
    target = folder / "config.json"
    if changed:
        target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(base / "config.json", target)


def _copy_index(file: Path, target: Path, size: int, dtype: torch.dtype | None) -> None:
    """Copy the list of shards; the bytes that it states follow the dtype."""
    index = json.loads(file.read_text(encoding="utf-8"))
    stated = index.get("metadata") or {}
    if dtype is None or stated.get("total_size") in (None, size):
        shutil.copyfile(file, target)
        return
    index["metadata"] = stated | {"total_size": size}
    target.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _places(shards: Mapping[Path, Shard], edited: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Path, str]]:
    """File and name there of each edited weight.

    Names in files may be older than those in the model, or have another prefix. So the nearest name counts under which
    the very numbers lie that the model was loaded with.
    """
    stored = [(file, one) for file, shard in shards.items() for one in shard.tensors]
    places: dict[str, tuple[Path, str]] = {}
    for name, (original, _) in edited.items():
        alike = [(file, one) for file, one in stored if one.shape == tuple(original.shape)]
        alike.sort(key=lambda found: _likeness(found[1].name, name), reverse=True)
        for file, one in alike:
            if (file, one.name) not in places.values() and _same(shards[file].read(one.name), original):
                places[name] = file, one.name
                break
        else:
            raise NotStoredAlone(name)
    return places


def _likeness(stored: str, name: str) -> tuple[int, float]:
    """How near a name in a file is to one in the model: parts in which their ends agree, then all of them."""
    theirs, ours = stored.split("."), name.split(".")
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(theirs[::-1], ours[::-1], strict=False)))
    return same, SequenceMatcher(None, theirs, ours).ratio()


def _same(stored: Tensor, original: Tensor) -> bool:
    return torch.equal(stored.to(original.dtype), original)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
