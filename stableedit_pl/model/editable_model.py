"""A causal language model with chosen sites, that can be asked, edited or not."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from lightning.pytorch import LightningModule

from stableedit_pl.devices import ranks
from stableedit_pl.devices.lockstep import in_step
from stableedit_pl.devices.sharding import ShardingError, shard_model
from stableedit_pl.errors import SettingError, require_choice
from stableedit_pl.model.asking import Scorer, ScoringPrecision, ScoringRule, autocast
from stableedit_pl.model.encoding import EncodedPrompts, Encoder
from stableedit_pl.model.loading import ModelDtype, context_length, hidden_size, load_language_model, load_tokenizer
from stableedit_pl.model.lower_outputs import LowerOutputs
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.scoring import RecordAnswers, answer_records, score_records
from stableedit_pl.model.sites import Site, site_names

SpecificityReference = Literal["base_output", "stated_answer"]


class EditableModel(LightningModule):
    """Loads the language model, finds its sites, and asks it.

    Args:
        base_model: folder or hub id of a Hugging Face causal language model; ``demo`` for the shipped one.
        sites: module names, globs, ``{a..b}`` ranges.
        model_dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        scoring: rule of all scores.
        specificity_reference: what specificity is agreement with.
        scoring_batch_size: prompts per forward pass when scoring.
    """

    def __init__(
        self,
        base_model: str,
        sites: Sequence[str],
        model_dtype: ModelDtype,
        scoring: ScoringRule,
        specificity_reference: SpecificityReference,
        scoring_batch_size: int,
    ) -> None:
        """See the class.

        Raises:
            SettingError: if a size is not positive.
        """
        super().__init__()
        require_choice("model_dtype", model_dtype, ModelDtype)
        require_choice("scoring", scoring, ScoringRule)
        require_choice("specificity_reference", specificity_reference, SpecificityReference)
        if scoring_batch_size < 1:
            raise SettingError(f"scoring_batch_size must be at least 1, got {scoring_batch_size}")
        self.base_model = base_model
        self.site_patterns = sites
        self.model_dtype = model_dtype
        self.scoring: ScoringRule = scoring
        self.specificity_reference = specificity_reference
        self.scoring_batch_size = scoring_batch_size
        self.device_map: Any = None
        self.sites: list[Site] = []
        self.edits_loaded = False
        self._divided = False
        self._tokenizer: Any = None
        self._partial_forward: PartialForward | None = None
        self._scoring_precision: ScoringPrecision | None = None

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base_model)
        return self._tokenizer

    def encoder(self, count_bare_space: bool = False) -> Encoder:
        """Encodes text for this model."""
        return Encoder(self.tokenizer, context_length(self.base_model), count_bare_space)

    def hidden_size(self) -> int:
        """Width of the base model's hidden state, known before it is loaded."""
        return hidden_size(self.base_model)

    def configure_model(self) -> None:
        """Load the base model and find its sites; does nothing the second time.

        Raises:
            LoadingError: if the model cannot be loaded.
            SiteError: if a pattern names nothing that can be edited.
            ShardingError: if the trainer's strategy divides the model over ranks, and this one cannot be.
        """
        mesh = self.device_mesh
        if self.sites:
            if mesh is not None and mesh.size() > 1 and not self._divided:
                raise ShardingError(
                    "the model was loaded whole before the trainer's strategy could divide it: leave configure_model "
                    "to the trainer, and give it a new editor"
                )
            return
        self.model = load_language_model(self.base_model, self.model_dtype, self.device_map)
        names = site_names(self.model, self.site_patterns)
        if mesh is not None:
            shard_model(self.model, mesh, names)
            self.model.eval()
            self._divided = True
        self.sites = [Site(name, self.model.get_submodule(name)) for name in names]

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Run with the base model's weights at all sites; the edited ones return afterwards, bit for bit."""
        with contextlib.ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(site.original_weight())
            yield

    def train(self, mode: bool = True) -> Self:
        """Set this module's flag; the language model stays in eval mode, as edits require."""
        super().train(mode)
        if self.sites:
            self.model.eval()
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the model, unless its device map already placed it; a trainer's precision rounds it all the same."""
        if not self._placed:
            super().to(*args, **kwargs)
        elif kwargs.get("dtype") is not None:
            super().to(dtype=kwargs["dtype"])
        return self

    def cpu(self) -> Self:
        """What Lightning does when a verb ends; a placed model's hooks would still send its inputs to where it was."""
        return self if self._placed else super().cpu()

    @property
    def _placed(self) -> bool:
        # transformers leaves its mark on the model only where there is more than one device.
        return bool(self.sites) and self.device_map is not None

    # ---- scoring

    @property
    def pad_id(self) -> int:
        """Token id that fills padding."""
        return Encoder(self.tokenizer).pad_id

    def scorer(self, rule: ScoringRule | None = None) -> Scorer:
        """Asks this model, by ``rule`` or the editor's own."""
        return Scorer(self.partial_forward, rule or self.scoring, self.scoring_batch_size, self.pad_id)

    @property
    def partial_forward(self) -> PartialForward:
        """The forward pass without what nobody needs, as far as this model allows."""
        if self._partial_forward is None:
            self._partial_forward = PartialForward.tried(self.model, self.sites)
        return self._partial_forward

    def answer(
        self,
        records: Sequence[EncodedPrompts],
        rule: ScoringRule | None = None,
        lower: LowerOutputs | None = None,
    ) -> list[RecordAnswers]:
        """This model's answers to all prompts of the edits.

        Args:
            records: the edits.
            rule: the editor's own by default.
            lower: takes and gives the outputs of layers that no edit changes, for prompts that are asked repeatedly.
        """
        with self.forward_context():
            return answer_records(self.scorer(rule), records, lower)

    def compare(
        self,
        records: Sequence[EncodedPrompts],
        answers: Sequence[RecordAnswers],
        base: Sequence[RecordAnswers],
        rule: ScoringRule | None = None,
    ) -> list[tuple[float, float | None, float | None]]:
        """Efficacy, generalization and specificity of each edit.

        Args:
            records: the edits.
            answers: of the model that is scored.
            base: of the unedited model; used when ``specificity_reference`` is ``base_output``.
            rule: instead of the editor's own.
        """
        reference = base if self.specificity_reference == "base_output" else None
        return score_records(records, answers, rule or self.scoring, reference)

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """The trainer's precision for forward passes outside ``training_step``, or :meth:`scored_in`'s.

        Ranks may run different numbers of them inside, but all must enter.

        Raises:
            RanksError: if one is lost.
        """
        trainer = self._trainer
        precision = contextlib.nullcontext() if trainer is None else trainer.precision_plugin.forward_context()
        coarser = autocast(self._scoring_precision, self.device)
        with ranks.noticing_losses(among_others=True), precision, coarser, in_step(self.model):
            yield

    @contextlib.contextmanager
    def scored_in(self, precision: ScoringPrecision | None) -> Iterator[None]:
        """Have scores taken inside in a coarser dtype; None leaves them in the trainer's precision."""
        self._scoring_precision = precision
        try:
            yield
        finally:
            self._scoring_precision = None

    def save_pretrained(self, folder: str) -> None:
        """Write the edited model and its tokenizer as an ordinary Hugging Face folder.

        Raises:
            ShardingError: if ranks hold the model in parts.
        """
        self.configure_model()
        if self.device_mesh is not None and self.device_mesh.size() > 1:
            raise ShardingError(
                "the ranks hold this model in parts, and none may hold it whole; write the folder from the run's "
                "checkpoint, on one process: stableedit export --run RUN_DIR --out FOLDER"
            )
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            file.chmod(0o644)  # safetensors writes weights that only their owner can read
