"""What ``strategy: sharded`` means: ranks that divide the model's weights, by FSDP2 and tensor parallelism."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from lightning.fabric.strategies.model_parallel import _setup_device_mesh
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

from stableedit_pl.devices import ranks
from stableedit_pl.devices.rank_strategy import WatchedRanks, ddp_means_ranks


class ShardedStrategy(WatchedRanks, ModelParallelStrategy):
    """Several devices hold one model between them.

    Args:
        data_parallel_size: over how many ranks FSDP2 divides every weight by rows; they also share every turn's edits.
            ``auto``: as many as there are groups of ``tensor_parallel_size``.
        tensor_parallel_size: over how many ranks, neighbours, layers are divided by the model's own plan; they run the
            same edits.
        rank_timeout: seconds that ranks wait for one another before the run stops.
        process_group_backend: as in Lightning's ``ModelParallelStrategy``.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        rank_timeout: float = 600.0,
        process_group_backend: str | None = None,
    ) -> None:
        """See the class.

        Raises:
            MisconfigurationException: if a size is not positive.
        """
        for name, size in (("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size)):
            if size != "auto" and size < 1:
                raise MisconfigurationException(f"{name} must be at least 1, got {size}")
        super().__init__(
            rank_timeout=rank_timeout,
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            # One file on rank 0, of whole weights: it is what other strategies write, and read.
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )
        self.sizes = data_parallel_size, tensor_parallel_size

    def setup_environment(self) -> None:
        """Meet the other ranks, once, and tell the module the mesh; the trainer may attach it after we met."""
        super().setup_environment()
        if self.lightning_module is not None:
            self.lightning_module._device_mesh = self.device_mesh

    def _meet(self) -> None:
        world = self.num_nodes * self.num_processes
        size, tensor = self.sizes
        data = max(world // tensor, 1) if size == "auto" else size
        if data * tensor != world:
            raise MisconfigurationException(
                f"data_parallel_size={data} times tensor_parallel_size={tensor} is {data * tensor}, but there are "
                f"{world} processes (trainer.devices times trainer.num_nodes)"
            )
        self._setup_distributed()
        self._device_mesh = _setup_device_mesh(data, tensor, world, self.root_device)
        teams = self._device_mesh.mesh.tolist() if tensor > 1 else []
        ranks.team_up(teams, self._device_mesh["tensor_parallel"].get_group())

    # ---- checkpoints: one file, as the editor writes it, instead of Lightning's own way with sharded models

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """No: ``configure_model`` has placed and divided the model already."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes, as always: there is nothing in it."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The editor's own, which puts divided weights together at rank 0."""
        return super(ModelParallelStrategy, self).lightning_module_state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Have the editor take over what is its own."""
        super(ModelParallelStrategy, self).load_model_state_dict(checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The closed-form optimizer's, which is empty."""
        return super(ModelParallelStrategy, self).optimizer_state(optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over what is there."""
        super(ModelParallelStrategy, self).load_optimizer_state_dict(checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write one file, at rank 0."""
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read one file, on every rank."""
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)


@contextmanager
def strategies_of_a_stream(rank_timeout: float) -> Iterator[None]:
    """Have a Trainer that is made inside find our strategies under their names, ``ddp`` and ``sharded``."""
    with ddp_means_ranks(rank_timeout):
        StrategyRegistry.register("sharded", ShardedStrategy, override=True, rank_timeout=rank_timeout)
        yield
