"""The files of a base model: where they lie, and which of them cannot be edited, told before anything is loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stableedit_pl.demo import demo_path
from stableedit_pl.errors import LoadingError

DEMO = "demo"
"""What ``base_model``, ``path`` and ``warmup_path`` say to mean the demo shipped with the package."""

ADAPTER = "adapter_config.json"

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers looks for them."""

_NOT_FETCHED = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.onnx*", "*/*"]
"""Weights, which loading fetches, and folders, which hold more of them."""


def resolve_base_model(base_model: str) -> str:
    """The folder or hub id that ``base_model`` stands for (``demo``: the shipped model)."""
    if base_model == DEMO:
        return str(demo_path("model"))
    return str(Path(base_model).expanduser()) if base_model.startswith("~") else base_model


def refuse_adapter(base_model: str, source: str) -> None:
    """Refuse weights that are only whole together with an adapter's.

    With the package peft, transformers would lay the adapter over them and save nothing but it; without, ignore it.

    Args:
        base_model: as the user named it.
        source: folder or hub id.

    Raises:
        LoadingError: saying how adapters are merged.
    """
    from transformers.utils.peft_utils import find_adapter_config_file  # seconds, that verify need not wait

    if find_adapter_config_file(source) is None:
        return
    raise LoadingError(
        f"base_model {base_model!r} holds a PEFT adapter ({ADAPTER}), and edits go to whole weights: they would be "
        "made without the adapter, or lost at export. Merge it first, with the packages peft and transformers:\n"
        "  model = AutoModelForCausalLM.from_pretrained(WHOLE_MODEL)\n"
        f"  PeftModel.from_pretrained(model, {source!r}).merge_and_unload().save_pretrained(FOLDER)\n"
        f"  AutoTokenizer.from_pretrained({source!r}).save_pretrained(FOLDER)\n"
        f"and give FOLDER as base_model. To edit the model as it is without the adapter, take {ADAPTER} and the "
        "adapter's weights out of the folder."
    )


def refuse_quantized(base_model: str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration of quantized weights: an edit adds small numbers, which integers cannot take.

    Args:
        base_model: as the user named it.
        config: as in its ``config.json``.

    Raises:
        LoadingError: naming the kind of quantization.
    """
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config") is not None), None)
    if found is None:
        return
    kind = found.get("quant_method") if isinstance(found, Mapping) else None
    raise LoadingError(
        f"base_model {base_model!r} is quantized ({kind or 'quantization_config'} in its config.json), and quantized "
        "weights cannot be edited. Give the unquantized model that it was made from (float32, bfloat16 or float16), "
        "and quantize what export writes."
    )


def base_folder(source: str, commit: str | None = None) -> Path:
    """The folder in which a base model's files lie; a hub id's is its snapshot in the cache.

    What is not there yet beside the weights (a processor's files, say) is fetched, where the hub can be reached.

    Args:
        source: folder or hub id.
        commit: of the hub's repository; None for the newest that is known.

    Raises:
        LoadingError: if there is no such folder.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=commit, ignore_patterns=_NOT_FETCHED))
    except (OSError, ValueError) as error:
        raise LoadingError(f"the files of base_model {source!r} are not there any more: {error}") from error


def folder_at_hand(source: str, commit: str | None = None) -> Path | None:
    """As :func:`base_folder`, but nothing is fetched; None where the files are not on this machine."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(source, "config.json", revision=commit)
    except HFValidationError:  # a folder that is not there
        return None
    return Path(config).parent if isinstance(config, str) else None


def hub_commit(source: str) -> str | None:
    """The commit of a hub id's newest snapshot on this machine, as hubs count them; None for a folder."""
    folder = None if Path(source).is_dir() else folder_at_hand(source)
    return None if folder is None else folder.name  # snapshots/COMMIT


def weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The index (none or one file) and the files from which transformers loads a folder's weights."""
    stated = stated_config(folder).get("transformers_weights")
    for name in [stated] if isinstance(stated, str) else _WEIGHT_FILES:
        file = folder / name
        if not file.is_file():
            continue
        if not name.endswith(".index.json"):
            return [], [file]
        shards = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
        return [file], [folder / shard for shard in dict.fromkeys(sorted(shards))]
    return [], []


def stated_config(folder: Path) -> Mapping[str, Any]:
    """What ``config.json`` in a folder says; nothing where it is not there or is no JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
