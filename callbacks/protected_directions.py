"""Updates that leave alone what the model does on ordinary text."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from stableedit_pl.data.ordinary_text import ordinary_text, text_file
from stableedit_pl.data.readers import file_checksum
from stableedit_pl.data.stream import EditStream
from stableedit_pl.devices import ranks
from stableedit_pl.editor import LifelongEditor
from stableedit_pl.errors import IncompatibleCheckpoint, SettingError
from stableedit_pl.method.guard import Guard, guard_bytes
from stableedit_pl.model.micro_batches import Batching
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import Site
from stableedit_pl.model.text_keys import guards_of_text


class ProtectedDirections(Callback):
    """Adds the keys of a text that is not edited to every turn's ridge regression, with targets of zero.

    On a real model this keeps unrelated answers at the same efficacy (docs/settings.md). The directions are found once,
    when the run begins, and kept in its checkpoints: a resumed run has the same.

    Args:
        path: the text: ``.txt``, a text a line, or rows in the stream's layout, whose prompts and locality prompts are
            taken; null for the rows of ``data.warmup_path``.
        weight: of the text, relative to a turn's own rows.
        rank: most directions of a site; each takes four bytes for each of its inputs.
        tokens: so many of the text are looked at.
    """

    def __init__(self, path: str | None = None, weight: float = 0.1, rank: int = 512, tokens: int = 4096) -> None:
        """See the class.

        Raises:
            SettingError: if a number is not positive.
        """
        for name, value in {"weight": weight, "rank": rank, "tokens": tokens}.items():
            if not value > 0:
                raise SettingError(f"ProtectedDirections.{name} must be positive, got {value}")
        self.path, self.weight, self.rank, self.tokens = path, weight, rank, tokens
        self._text: str | None = None
        self._began_with: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the editor that directions are wanted.

        Raises:
            MisconfigurationException: if the data is no EditStream.
        """
        if isinstance(pl_module, LifelongEditor):
            pl_module.guarded = True
        if stage == "fit" and not isinstance(trainer.datamodule, EditStream):  # type: ignore[attr-defined]
            raise MisconfigurationException("ProtectedDirections needs an EditStream as the data module")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must share; the directions themselves are the editor's."""
        return {"weight": self.weight, "rank": self.rank, "tokens": self.tokens, "text": self._text}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what the run began with, to be held against the settings once the data is there."""
        self._began_with = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LifelongEditor) -> None:  # type: ignore[override]
        """Find the directions of a new run.

        Raises:
            IncompatibleCheckpoint: if the run began without them, with another text or other settings.
            MisconfigurationException: where ranks divide the weights.
        """
        stream = trainer.datamodule  # type: ignore[attr-defined]
        self._text = file_checksum(text_file(stream, self.path))
        guards = pl_module.state.guards
        if not guards and trainer.global_step > 0:
            raise IncompatibleCheckpoint(
                "the run began without ProtectedDirections: go on without, or start a new run with --fork_from"
            )
        if guards:
            if self._began_with != self.state_dict():
                raise IncompatibleCheckpoint(
                    f"the run has ProtectedDirections with {self._began_with}, now they are {self.state_dict()} (text: "
                    "a digest of its file): go on with the old ones, or start a new run with --fork_from"
                )
            return
        if any(site.shard.sharded for site in pl_module.sites):
            raise MisconfigurationException("ProtectedDirections needs whole weights: not under strategy sharded")
        with pl_module.forward_context():
            found = self.guards(pl_module, stream, pl_module.sites, pl_module.partial_forward)
        for name, guard in found.items():
            # Those of the first rank, whatever another processor makes of the text.
            guards[name] = guard if ranks.world() == 1 else Guard(**ranks.broadcast(vars(guard)))
        text = self.path or "the warm-up rows"
        megabytes = sum(guard_bytes(site.d_in, self.rank) for site in pl_module.sites) / 1e6
        rank_zero_info(f"Updates leave alone {self.rank} directions of {text} at each site, {megabytes:.0f} MB in all")

    def guards(
        self, editor: LifelongEditor, stream: EditStream, sites: list[Site], forward: PartialForward
    ) -> dict[str, Guard]:
        """The directions of sites that the editor's model has, edited or not.

        Args:
            editor: its model is loaded.
            stream: says where the text is.
            sites: of that model.
            forward: runs it.
        """
        encodings = ordinary_text(stream, editor.encoder(stream.count_bare_space), self.path)
        batching = Batching(stream.micro_batch_tokens, None)
        return guards_of_text(forward, sites, encodings, batching, editor.pad_id, self.rank, self.weight, self.tokens)
