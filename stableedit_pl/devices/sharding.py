"""A language model divided over ranks: its weights become ``DTensor`` shards, by FSDP2, tensor parallelism, or both.

*FSDP2* (``data_parallel``) divides every weight by rows; torch gathers a layer's weights for its forward and backward
and lets them go again. *Tensor parallelism* (``tensor_parallel``) divides layers by the plan that the model's own
configuration states, and nobody ever has such a weight whole: a rank computes with its shard, activations travel.

The model is divided while it is on the meta device, and each rank then copies its shards out of the checkpoint's files,
which transformers maps into memory: no rank reads, or allocates, the whole model.
"""

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from stableedit_pl.devices.weight_shards import local, shard_slices

_STYLES: dict[str, Callable[[], ParallelStyle] | None] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "replicated_with_grad_allreduce": None,  # a matter of training: the weight stays whole on every rank
}
"""transformers' names for how a layer is divided, as far as torch does the same."""


class ShardingError(ValueError):
    """A model that cannot be divided as asked."""


@torch.no_grad()
def shard_model(model: Any, mesh: DeviceMesh, whole_groups: Collection[str] = ()) -> None:
    """Divide a model over the ranks of a mesh, in place. All ranks must call it.

    Args:
        model: transformers' language model, loaded, on the CPU.
        mesh: with dimensions ``data_parallel`` and ``tensor_parallel``.
        whole_groups: modules that FSDP2 must not replace by a class of its own: the sites.

    Raises:
        ShardingError: if the model states no plan that torch can follow, or its sizes do not allow it.
    """
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if mesh.size() == 1:
        return
    styles = _tensor_parallel_styles(model, tensor.size()) if tensor.size() > 1 else {}
    blocks = _blocks(model) if data.size() > 1 else []
    source = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    model.to("meta")
    model.tie_weights()
    if styles:
        parallelize_module(model, tensor, styles)
    if blocks:
        for block in [*blocks, *_embeddings(model, whole_groups)]:
            fully_shard(block, mesh=data)
        # Under tensor parallelism outputs are views, and torch warns of changing them in place, which nobody does here.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        # The root would keep its weights whole after a forward pass otherwise, and edits go to shards.
        fully_shard(model, mesh=data, reshard_after_forward=True)
    model.to_empty(device=_device(mesh))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        local(parameter).copy_(source[name][shard_slices(parameter)])
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.requires_grad_(False)


def _device(mesh: DeviceMesh) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")


def _blocks(model: Any) -> list[nn.Module]:
    """The layers, each of which FSDP2 gathers as one."""
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        raise ShardingError(
            f"{type(model).__name__} does not say what its layers are (_no_split_modules), so that FSDP2 would gather "
            "the whole model at once; set tensor_parallel_size to the number of devices, and data_parallel_size to 1"
        )
    return blocks


def _embeddings(model: Any, whole_groups: Collection[str]) -> list[nn.Module]:
    """Input and output embeddings, where each can be gathered on its own."""
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is None or inputs.weight is outputs.weight:
        return []
    kept = [model.get_submodule(name) for name in whole_groups]
    return [module for module in (inputs, outputs) if not any(module is one for one in kept)]


def _tensor_parallel_styles(model: Any, size: int) -> dict[str, ParallelStyle]:
    """The model's own plan, in torch's terms."""
    name, config = type(model).__name__, model.config.get_text_config()
    plan: dict[str, str] = dict(model.tp_plan or {})
    if not plan:
        raise ShardingError(
            f"{name} states no tensor-parallel plan (base_model_tp_plan in its configuration); set "
            "tensor_parallel_size to 1, and data_parallel_size to the number of devices"
        )
    foreign = [f"{layer}: {style}" for layer, style in plan.items() if style not in _STYLES]
    if foreign:
        raise ShardingError(
            f"{name}'s tensor-parallel plan asks for {', '.join(foreign)}; supported are "
            f"{', '.join(_STYLES)}. Set tensor_parallel_size to 1, and data_parallel_size to the number of devices"
        )
    heads = {key: getattr(config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
    wrong = [f"{key}={count}" for key, count in heads.items() if count is not None and count % size]
    wrong += [
        f"{layer} with {width} {what}"
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for width, what in [_divided_width(plan, layer, module)]
        if width % size
    ]
    if wrong:
        raise ShardingError(
            f"{name} cannot be divided over tensor_parallel_size={size}: {', '.join(wrong[:3])} cannot be divided "
            "evenly; choose a size that divides them"
        )
    return {layer: make() for layer, style in plan.items() if (make := _STYLES[style]) is not None}


def _divided_width(plan: dict[str, str], layer: str, module: nn.Linear) -> tuple[int, str]:
    """The width of a layer that its style divides without knowing the whole (0: none), and what it is."""
    pattern = ".".join("*" if part.isdigit() else part for part in layer.split("."))
    style = plan.get(pattern, plan.get(layer))
    if style in ("rowwise", "rowwise_split_input"):
        return module.in_features, "inputs"
    return (module.out_features, "outputs") if style == "colwise" else (0, "")
