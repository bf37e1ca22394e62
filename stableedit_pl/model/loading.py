"""The language model and its tokenizer, from a folder, a hub id, or the demo shipped with the package."""

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stableedit_pl.demo import demo_path
from stableedit_pl.errors import require_choice

DEMO = "demo"
"""What ``base_model``, ``path`` and ``warmup_path`` say to mean the demo shipped with the package."""

ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadingError(ValueError):
    """A base model that cannot be had under the name given."""


def resolve_base_model(base_model: str) -> str:
    """The folder or hub id that ``base_model`` stands for (``demo``: the shipped model)."""
    if base_model == DEMO:
        return str(demo_path("model"))
    return str(Path(base_model).expanduser()) if base_model.startswith("~") else base_model


def load_tokenizer(base_model: str) -> Any:
    """Load the tokenizer of ``base_model``.

    Raises:
        LoadingError: if there is none.
    """
    source = resolve_base_model(base_model)
    _check_folder(base_model, source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise LoadingError(f"cannot load the tokenizer of base_model {base_model!r}: {error}") from error


def load_language_model(base_model: str, model_dtype: str = "auto", device_map: Any = None) -> Any:
    """Load the causal language model, frozen and in eval mode.

    Args:
        base_model: folder, hub id or ``demo``.
        model_dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device_map: handed to transformers; None keeps the whole model on one device.

    Raises:
        LoadingError: if it cannot be loaded.
    """
    source = resolve_base_model(base_model)
    _check_folder(base_model, source)
    require_choice("model_dtype", model_dtype, ModelDtype)
    options: dict[str, Any] = {"dtype": _DTYPES.get(model_dtype, "auto")}
    if device_map is not None:
        options["device_map"] = device_map
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise LoadingError(f"cannot load base_model {base_model!r}: {error}") from error
    return model.eval().requires_grad_(False)


def load_skeleton(base_model: str, model_dtype: str = "auto") -> Any:
    """The causal language model on the ``meta`` device: shapes and names from its configuration, no weights.

    Args:
        base_model: folder, hub id or ``demo``.
        model_dtype: as in :func:`load_language_model`; ``auto`` is what the configuration states, or float32.

    Raises:
        LoadingError: if there is no configuration, or none of a causal language model.
    """
    source = resolve_base_model(base_model)
    _check_folder(base_model, source)
    require_choice("model_dtype", model_dtype, ModelDtype)
    try:
        config = AutoConfig.from_pretrained(source)
        dtype = _DTYPES.get(model_dtype) or config.get_text_config().dtype or torch.float32
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise LoadingError(f"cannot load the configuration of base_model {base_model!r}: {error}") from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


def context_length(base_model: str) -> int | None:
    """Longest input in tokens by the base model's configuration; None if it states none."""
    length = getattr(_text_config(base_model), "max_position_embeddings", None)
    return int(length) if length else None


def hidden_size(base_model: str) -> int:
    """Width of the hidden state by the base model's configuration."""
    return int(_text_config(base_model).hidden_size)


def _text_config(base_model: str) -> Any:
    source = resolve_base_model(base_model)
    _check_folder(base_model, source)
    try:
        return AutoConfig.from_pretrained(source).get_text_config()
    except (OSError, ValueError) as error:
        raise LoadingError(f"cannot load the configuration of base_model {base_model!r}: {error}") from error


def _check_folder(base_model: str, source: str) -> None:
    looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
    if looks_local and not (Path(source) / "config.json").is_file():
        raise LoadingError(
            f"base_model {base_model!r}: no config.json in {source}. Give the folder that "
            "save_pretrained wrote, a model id of a hub, or demo."
        )
