"""Processes that meet over gloo and run one function of a test."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from stableedit_pl.devices import ranks

# Imports take longer than any of these tests: a server takes them once, and ranks are forked from it.
multiprocessing.set_forkserver_preload(
    ["stableedit_pl.editor", "stableedit_pl.data.readers", "transformers.models.llama.modeling_llama", "torch.profiler"]
)


def in_ranks(data: int, tensor: int, function: Callable[..., None], *args: Any) -> None:
    """Run ``function(mesh, *args)``, of a test module's top level, on ``data`` times ``tensor`` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        given = (data, tensor, folder, function, args)
        mp.start_processes(_rank, given, nprocs=data * tensor, start_method="forkserver")  # type: ignore[no-untyped-call]


def _rank(rank: int, data: int, tensor: int, folder: str, function: Callable[..., None], args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), data * tensor)
    patience = timedelta(seconds=60)  # ranks that are out of step wait for one another
    dist.init_process_group("gloo", store=store, rank=rank, world_size=data * tensor, timeout=patience)
    mesh: DeviceMesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data_parallel", "tensor_parallel"))
    ranks.team_up(mesh.mesh.tolist() if tensor > 1 else [], mesh["tensor_parallel"].get_group())
    try:
        function(mesh, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
