"""All ranks hold the same bytes, or the run stops."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from stableedit_pl.devices import ranks
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import SettingError
from stableedit_pl.run.files.saved_state import STATISTICS, weight_name


class RankAgreement(Callback):
    """Compares checksums of weights, moments and position over the ranks; nothing with one process.

    Where ranks divide a weight, those that hold the same part of it are compared.

    Args:
        every_n_turns: compare after every so many turns, before every checkpoint, at the start and at the end. It costs
            a pass over each site's weight and moments.
    """

    def __init__(self, every_n_turns: int = 10) -> None:
        """See the class.

        Raises:
            SettingError: if ``every_n_turns`` is not positive.
        """
        if every_n_turns < 1:
            raise SettingError(f"RankAgreement.every_n_turns must be at least 1, got {every_n_turns}")
        self.every_n_turns = every_n_turns
        self._compared = -1

    def on_train_start(self, trainer: Trainer, pl_module: LifelongEditor) -> None:  # type: ignore[override]
        """All start, or resume, alike.

        Raises:
            RanksError: if they do not; likewise below.
        """
        self._compare(trainer, pl_module)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LifelongEditor, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare when due."""
        if trainer.global_step % self.every_n_turns == 0:
            self._compare(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LifelongEditor, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        """Nothing is saved that the ranks do not agree on."""
        self._compare(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LifelongEditor) -> None:  # type: ignore[override]
        """All end alike."""
        self._compare(trainer, pl_module)

    def _compare(self, trainer: Trainer, editor: LifelongEditor) -> None:
        turn = editor.state.committed_turns
        if ranks.world() > 1 and self._compared != turn:
            tensors = {f"{STATISTICS}{name}": tensor for name, tensor in editor.state.statistics.tensors().items()}
            for site in editor.sites:
                # A part of a weight that ranks divide is held against the same part alone.
                part = f" {site.shard}" if site.shard.sharded else ""
                tensors |= {f"{weight_name(site)}{part}": site.state, f"model.{site.name}{part}": site.weight}
            checksums = {name: ranks.fingerprint(tensor) for name, tensor in tensors.items()}
            ranks.refuse_disagreement({**checksums, "turns": turn}, turn)
            self._compared = turn
