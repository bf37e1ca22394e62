"""The language model and its tokenizer, from a folder, a hub id, or the demo shipped with the package."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from stableedit_pl.errors import LoadingError, require_choice
from stableedit_pl.model.files.base_files import DEMO, refuse_adapter, refuse_quantized, resolve_base_model

__all__ = [
    "DEMO",
    "LoadingError",
    "ModelDtype",
    "context_length",
    "hidden_size",
    "load_language_model",
    "load_skeleton",
    "load_tokenizer",
    "resolve_base_model",
    "vocabulary_size",
]

ModelDtype = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_LISTED = 5
"""Weights named in one message."""


def load_tokenizer(base_model: str) -> Any:
    """Load the tokenizer of ``base_model``.

    Raises:
        LoadingError: if there is none.
    """
    source = resolve_base_model(base_model)
    _check_folder(base_model, source)
    with _explained(f"the tokenizer of base_model {base_model!r}"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_language_model(base_model: str, model_dtype: str = "auto", device_map: Any = None) -> Any:
    """Load the causal language model, frozen and in eval mode.

    Args:
        base_model: folder, hub id or ``demo``.
        model_dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device_map: handed to transformers; None keeps the whole model on one device.

    Raises:
        LoadingError: if it cannot be loaded, or its files do not hold all of its weights.
    """
    source = resolve_base_model(base_model)
    _check_folder(base_model, source)
    require_choice("model_dtype", model_dtype, ModelDtype)
    options: dict[str, Any] = {"dtype": _DTYPES.get(model_dtype, "auto")}
    if device_map is not None:
        options["device_map"] = device_map
    refuse_quantized(base_model, _config(base_model, source).to_dict())
    with _explained(f"base_model {base_model!r}"):
        refuse_adapter(base_model, source)
        # Weights of another size are named below, with those that are missing.
        options |= {"trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    model, found = loaded
    _refuse_drawn_weights(base_model, found)
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
    config = _config(base_model, source)
    refuse_quantized(base_model, config.to_dict())
    with _explained(f"the configuration of base_model {base_model!r}"):
        dtype = _DTYPES.get(model_dtype) or config.get_text_config().dtype or torch.float32
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, trust_remote_code=False
            )
        model.tie_weights()
    return model.eval().requires_grad_(False)


def context_length(base_model: str) -> int | None:
    """Longest input in tokens by the base model's configuration; None if it states none."""
    return _stated_size(base_model, "max_position_embeddings")


def vocabulary_size(base_model: str) -> int | None:
    """Token ids that the base model has embeddings for, by its configuration; None if it states none."""
    return _stated_size(base_model, "vocab_size")


def hidden_size(base_model: str) -> int:
    """Width of the hidden state by the base model's configuration.

    Raises:
        LoadingError: if it states none.
    """
    width = _stated_size(base_model, "hidden_size")
    if width is None:
        raise LoadingError(f"the configuration of base_model {base_model!r} does not state a hidden_size")
    return width


def _stated_size(base_model: str, name: str) -> int | None:
    source = resolve_base_model(base_model)
    _check_folder(base_model, source)
    size = getattr(_config(base_model, source).get_text_config(), name, None)
    return int(size) if size else None


def _config(base_model: str, source: str) -> Any:
    with _explained(f"the configuration of base_model {base_model!r}"):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def _check_folder(base_model: str, source: str) -> None:
    looks_local = source.startswith((".", "/", "~")) or Path(source).exists()
    if not looks_local:
        return
    if Path(source).is_dir():
        refuse_adapter(base_model, source)
    if not (Path(source) / "config.json").is_file():
        raise LoadingError(
            f"base_model {base_model!r}: no config.json in {source}. Give the folder that "
            "save_pretrained wrote, a model id of a hub, or demo."
        )


def _refuse_drawn_weights(base_model: str, found: Mapping[str, Any]) -> None:
    """Refuse a model of which some weights were not in its files: they are random, and others at every load.

    Args:
        base_model: as the user named it.
        found: transformers' account of the loading. It does not count weights that the architecture ties or derives.
    """
    missing = sorted(found["missing_keys"])
    wrong = [
        f"{name} {list(stored)}, should be {list(wanted)}" for name, stored, wanted in sorted(found["mismatched_keys"])
    ]
    failed = [str(message) for message in found.get("error_msgs") or []]
    problems = [
        f"{what}: {', '.join(names[:_LISTED])}" + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for what, names in (("missing", missing), ("of another size", wrong), ("not readable", failed))
        if names
    ]
    if problems:
        raise LoadingError(
            f"the files of base_model {base_model!r} do not hold the weights that its config.json asks for "
            f"({'; '.join(problems)}). They would be drawn at random at every load. Give the whole model (was a "
            "download or save cut short, or is config.json another model's?)"
        )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Make one sentence of whatever transformers, and the libraries behind it, say of files they cannot take.

    Their errors have no common class: a missing package, an unknown field of a newer version and a bad number each
    come as another one.
    """
    try:
        yield
    except LoadingError:
        raise
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        if "trust_remote_code" in said:
            raise LoadingError(
                f"{what} needs program code that comes with it (auto_map), and such code is never run: there is no "
                "setting trust_remote_code. Give a version of the model that transformers knows by itself (on hubs "
                "often named ...-hf), or upgrade transformers if it has learned the architecture since; from Python, "
                "register the model's classes with transformers (AutoConfig.register, AutoModelForCausalLM.register) "
                "before the editor is made"
            ) from error
        if not isinstance(error, (OSError, ValueError)):
            said = f"{type(error).__name__}: {said}"
        raise LoadingError(f"cannot load {what}: {said}{_hint(error)}") from error


def _hint(error: Exception) -> str:
    """What to do about an error that says nothing of it."""
    said = str(error)
    if "untagged enum" in said or "did not match any variant" in said:
        return (
            ". tokenizer.json is of another version of the package tokenizers: upgrade tokenizers and transformers, or "
            "write the file again with the version that made it"
        )
    if isinstance(error, ImportError):
        return ". Install the package it asks for in this environment"
    return ""
