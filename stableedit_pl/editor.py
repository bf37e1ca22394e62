"""``LifelongEditor``: the language model, its edited sites and its LN statistics, as a LightningModule.

One turn: ``training_step`` captures keys and value gradients (its own backward), Lightning calls the optimizer,
and ``ClosedFormEdit.step`` plans and commits. ``trainer.global_step`` is the number of committed turns.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from stableedit_pl.data.turns import Turn
from stableedit_pl.devices import ranks
from stableedit_pl.devices.division import DivideAlgebra, solve_together
from stableedit_pl.devices.shares import Share, gather_edits
from stableedit_pl.errors import GO_ON, IncompatibleCheckpoint, SettingError, require_choice
from stableedit_pl.method.guard import Guard
from stableedit_pl.method.normalization import Normalization, WhiteningSolver
from stableedit_pl.method.scales import Scale, plain_scales
from stableedit_pl.method.settings import BEFORE_PASSES, MethodSettings
from stableedit_pl.method.statistics import LNStatistics, StatisticsScope
from stableedit_pl.model.asking import ScoringRule
from stableedit_pl.model.capture import Captured, LossReduction, Pass
from stableedit_pl.model.closed_form import BadTurns, ClosedFormEdit, EditorState, StepInput
from stableedit_pl.model.digests import base_model_digest, base_weights_digest, tokenizer_digest
from stableedit_pl.model.editable_model import SpecificityReference
from stableedit_pl.model.loading import ModelDtype
from stableedit_pl.model.scoring import match
from stableedit_pl.model.shared_capture import capture_together
from stableedit_pl.run.files.checkpoint_io import read_checkpoint
from stableedit_pl.run.files.saved_state import load_tensors, refuse_other_run, saved_tensors, stored_identity
from stableedit_pl.run.guards import check_trainer
from stableedit_pl.run.report import TurnReport
from stableedit_pl.run.scored_model import ScoredModel

MasterDtype = Literal["float32", "model"]

_FORK = (
    "A fork has its run's base model, sites and statistics_scope: set them as they were, or leave out --fork_from to "
    "start from the base model."
)
_ASK = (
    "Set them as they were: --config RUN_DIR/config.yaml has all of a run's settings. Without --ckpt_path the base "
    "model is asked."
)


class LifelongEditor(ScoredModel):
    """Edits a causal language model turn by turn with lifelong normalization (StableEdit, arXiv 2605.11836).

    Args:
        base_model: folder or hub id of a Hugging Face causal language model; ``demo`` for the shipped one.
        sites: weights to edit: module names, globs, ``{a..b}`` ranges; one, or a list of them.
        normalization: ``whiten`` (StableEdit), ``standardize`` (UltraEdit) or ``none`` (no lifelong normalization).
        relative_step: how much a pass adds to a site's outputs at the turn's edits, relative to these outputs; 0.2
            where step_size is not given. Becomes a step size once, and is recorded.
        relative_ridge: ridge relative to the mean squared norm of a site's inputs; 0.01 where ridge is not given.
        step_size: scale of the targets of the ridge regression: relative_step in absolute terms.
        ridge: weight of the update's squared norm, larger changes less: relative_ridge in absolute terms.
        passes: how often a turn looks at its edits, each time with the weights as planned so far; 1: the paper. A turn
            stops early when nothing is left to do.
        enough_margin: further passes leave an answer token alone once its probability is so far ahead of every other's.
        prior_strength: pseudo-observations per dimension of the value gradients' covariance prior; 0 selects
            the paper's improper prior.
        eigenvalue_floor: absolute lower bound on the covariance estimate's eigenvalues.
        whitening_solver: who takes the covariance's inverse root: ``eigh``, ``quadrature`` (needs a positive
            prior_strength and no floor), or ``auto``, by device and width. A resumed run may change it.
        divide_algebra: with several processes, solve each site at one of them and send the solutions to all
            (``always``), or everything everywhere (``never``), or ``auto``, by sizes. A resumed run may change it.
        statistics_scope: one set of moments per ``site``, or per ``shape`` as the published program.
        loss_reduction: ``token_sum`` (results do not depend on micro-batches) or ``micro_batch_mean`` (the
            published program).
        master_dtype: ``float32`` keeps a float32 copy of the sites of a bfloat16 or float16 model and rounds from
            there; ``model`` updates the weights in their own dtype.
        model_dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        bad_turns: what happens to a turn whose loss, gradients, moments or update are not finite, or whose update is
            exactly zero although edits are not satisfied: ``raise``, or ``skip`` it (its edits go to rejected.jsonl).
        max_update_norm: treat an update alike whose norm is more than so many times the running median; null: never.
        scoring: rule of all scores: ``token_match``, ``exact_match`` or ``greedy_match``.
        specificity_reference: specificity is agreement with the unedited model's own output (``base_output``) or
            with the data's ``stated_answer``.
        scoring_batch_size: prompts per forward pass when scoring.
    """

    def __init__(
        self,
        base_model: str,
        sites: list[str] | str,
        normalization: Normalization = "whiten",
        step_size: float | None = None,
        ridge: float | None = None,
        prior_strength: float = 1.0,
        eigenvalue_floor: float = 0.0,
        statistics_scope: StatisticsScope = "site",
        loss_reduction: LossReduction = "token_sum",
        master_dtype: MasterDtype = "float32",
        model_dtype: ModelDtype = "auto",
        bad_turns: BadTurns = "raise",
        max_update_norm: float | None = None,
        scoring: ScoringRule = "token_match",
        specificity_reference: SpecificityReference = "base_output",
        scoring_batch_size: int = 128,
        whitening_solver: WhiteningSolver = "auto",
        divide_algebra: DivideAlgebra = "auto",
        relative_step: float | None = None,
        relative_ridge: float | None = None,
        passes: int = 10,
        enough_margin: float = 0.5,
    ) -> None:
        """See the class.

        Raises:
            ValueError: if a setting is out of range.
        """
        sites = [sites] if isinstance(sites, str) else sites
        super().__init__(base_model, sites, model_dtype, scoring, specificity_reference, scoring_batch_size)
        self.save_hyperparameters()
        self.hparams["sites"] = sites
        self.settings = MethodSettings(
            normalization,
            step_size,
            ridge,
            prior_strength,
            eigenvalue_floor,
            whitening_solver,
            relative_step,
            relative_ridge,
            passes,
            enough_margin,
        )
        require_choice("divide_algebra", divide_algebra, DivideAlgebra)
        self.divide_algebra: DivideAlgebra = divide_algebra
        require_choice("statistics_scope", statistics_scope, StatisticsScope)
        require_choice("loss_reduction", loss_reduction, LossReduction)
        require_choice("master_dtype", master_dtype, MasterDtype)
        self.statistics_scope: StatisticsScope = statistics_scope
        self.loss_reduction: LossReduction = loss_reduction
        self.master_dtype = master_dtype
        require_choice("bad_turns", bad_turns, BadTurns)
        if max_update_norm is not None and not max_update_norm > 0:
            raise SettingError(f"max_update_norm must be positive or null, got {max_update_norm}")
        self.bad_turns: BadTurns = bad_turns
        self.max_update_norm = max_update_norm
        self.state_devices: Mapping[str, torch.device] = {}  # site name to where its state lives; absent: beside it
        self.start_from: Path | None = None
        self.forked_from: str | None = None
        self.guarded = False
        self.report: TurnReport | None = None
        self._captured: Captured | None = None
        self._turn: Turn | None = None
        self._shares: list[Share] = []
        self._capture_seconds = 0.0

    def configure_model(self) -> None:
        """Load the base model, find its sites, and start their statistics; does nothing the second time.

        Raises:
            LoadingError: if the model cannot be loaded.
            SiteError: if a pattern names nothing that can be edited.
            ShardingError: if the strategy divides models over ranks, and this one cannot be, or is loaded whole.
        """
        known = bool(self.sites)
        super().configure_model()
        if not known:
            for site in self.sites:
                site.master_device = self.state_devices.get(site.name)
            self.state = EditorState(LNStatistics.empty(self.sites, self.statistics_scope))
            self._base_digest = base_model_digest(self.model.config, self.sites)
            self._base_weights = base_weights_digest(self.base_model, self.base_commit)

    def place_state(self) -> None:
        """Put moments and master weights where the algebra happens: as in ``state_devices``, or beside each site."""
        devices = {site.name: self.state_devices.get(site.name, site.weight.device) for site in self.sites}
        placed = LNStatistics.empty(self.sites, self.statistics_scope, devices)
        self.state.statistics = placed.loaded(self.state.statistics.tensors(), "this run")
        for site in self.sites:
            if self.master_dtype == "float32":
                site.use_master(devices[site.name])

    # ---- one turn

    def setup(self, stage: str) -> None:
        """Refuse trainer settings that would break the stream.

        Raises:
            MisconfigurationException: naming the setting and what to use instead.
        """
        if stage == "fit":
            check_trainer(self.trainer)

    def on_fit_start(self) -> None:
        """Place the editor's state; the model is on its device by now. A fork takes over another run's first.

        Raises:
            IncompatibleCheckpoint: if that run has another base model, other sites or another statistics scope.
        """
        if self.start_from is not None:
            source = read_checkpoint(self.start_from)
            shared = ("base_model", "base_weights", "sites", "statistics_scope")
            source_name = f"--fork_from {self.start_from}"
            refuse_other_run(source_name, stored_identity(source), self.identity(), shared, _FORK)
            self.load_state_dict(source["state_dict"])
            self.forked_from = f"{self.start_from} ({stored_identity(source)['committed_turns']} turns)"
        self.place_state()

    def on_train_start(self) -> None:
        """Hold the loops' position against the editor's own.

        Raises:
            RuntimeError: if they differ.
            IncompatibleCheckpoint: if the run has protected directions, and nothing asks for them now.
        """
        if self.state.guards and not self.guarded:
            raise IncompatibleCheckpoint(
                "the run has ProtectedDirections: add the callback as it was, or start a new run with --fork_from"
            )
        if self.state.committed_turns != self.trainer.global_step:
            raise RuntimeError(
                f"the checkpoint has {self.state.committed_turns} committed turns but the trainer is at step "
                f"{self.trainer.global_step}; resume from a checkpoint of this project, or start a new run"
            )

    def configure_optimizers(self) -> ClosedFormEdit:
        """The optimizer whose step is one turn."""
        return ClosedFormEdit(
            self.sites,
            self.state,
            self._take_input,
            self.bad_turns,
            self.max_update_norm,
            partial(solve_together, divide=self.divide_algebra),
            lr=float(self.settings.step_size or self.settings.relative_step or 0.0),
        )

    def training_step(self, turn: Turn, batch_idx: int) -> Tensor:
        """Capture the turn's keys and value gradients.

        Returns:
            Mean loss of the turn's edits before it is applied, detached.
        """
        started = time.perf_counter()
        self._turn = turn
        self._captured, self._shares = self._capture(turn)
        self._capture_seconds = time.perf_counter() - started
        return self._captured.measured[0].mean()

    def _capture(self, turn: Turn, earlier: Sequence[Pass] | None = None) -> tuple[Captured, list[Share]]:
        return capture_together(
            self.partial_forward,
            self.sites,
            [edit.encoding for edit in turn.edits],
            turn.micro_batches,
            self.pad_id,
            self.loss_reduction,
            earlier,
        )

    def _capture_again(self) -> Captured:
        """The turn's edits with the weights as they are now: a further pass."""
        assert self._captured is not None and self._turn is not None
        with self.trainer.precision_plugin.train_step_context():  # the closure alone runs inside it
            return self._capture(self._turn, self._captured.passes)[0]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``training_step`` took the gradients it needs."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Apply the turn, then measure what it did (``self.report``)."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step: ClosedFormEdit = getattr(optimizer, "optimizer", optimizer)
        assert self._turn is not None and self._captured is not None and step.last is not None
        started = time.perf_counter()
        losses_after, scores = self._captured.losses, None
        if step.last.plan.updates:
            losses_after, scores = self._at_edit(self._turn, self._captured)
        seconds = {"capture": self._capture_seconds, **step.last.seconds, "score": time.perf_counter() - started}
        self.report = TurnReport(
            turn=self._turn,
            losses_before=self._captured.losses,
            losses_after=losses_after,
            known_before=[correct == 1.0 for correct in self._captured.correct],
            at_edit=scores,
            step=step.last,
            seconds=seconds,
        )
        self._captured = None

    def _take_input(self) -> StepInput:
        assert self._captured is not None and self._turn is not None
        override = self._turn.normalization
        settings = self.settings if override is None else replace(self.settings, normalization=override)
        return StepInput(
            self._captured,
            settings,
            self._turn.update_weights,
            self._capture_again,
            count_rows=self._turn.counted_in is None or self._turn.counted_in in self.state.rejected_turns,
            keep_scales=override is None,
            seconds=self._capture_seconds,
        )

    def _at_edit(self, turn: Turn, captured: Captured) -> tuple[list[float], list[float]]:
        """Losses and scores of the turn's own edits right after it."""
        scorer = self.scorer()
        encodings = [edit.encoding for edit in turn.edits]
        if ranks.world() > 1:
            encodings = [encodings[i] for i in self._shares[ranks.part()].members]
        with self.forward_context():
            forced = scorer.again(captured.passes)
            answers = scorer.answers(encodings) if self.scoring == "greedy_match" else forced
        scores = [
            match(answer.tokens, tuple(encoding.target_ids), self.scoring)
            for answer, encoding in zip(answers, encodings, strict=True)
        ]
        if ranks.world() > 1:
            own = torch.tensor([[answer.loss for answer in forced], scores], dtype=torch.float64)
            losses, scores = gather_edits(own.T, self._shares).T.tolist()
            return losses, scores
        return [answer.loss for answer in forced], scores

    # ---- checkpoints

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that loads it: base model, sites and method."""
        return {
            "base_model": self._base_digest,
            "base_weights": self._base_weights,
            "tokenizer": tokenizer_digest(self.tokenizer),
            "sites": [site.name for site in self.sites],
            **self.settings.identity(),
            "statistics_scope": self.statistics_scope,
            "loss_reduction": self.loss_reduction,
            "master_dtype": self.master_dtype,
            "model_dtype": self.model_dtype,
            "bad_turns": self.bad_turns,
            "max_update_norm": self.max_update_norm,
        }

    def identity(self) -> dict[str, Any]:
        """The fingerprint, and the commit of the hub's repository that the base model was loaded from, if any."""
        return {"fingerprint": self.fingerprint(), "base_commit": self.base_commit}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The edited sites' weights (``model.<name>.weight``) and the moments (``statistics/...``); nothing else.

        Where ranks divide the weights all must call it; rank 0 gets them, whole, and the others the moments alone.

        Raises:
            RuntimeError: in the middle of a commit, when weights and statistics belong to different turns.
        """
        if not self.sites:
            return {}
        if self.state.committing:
            raise RuntimeError("a turn is half committed: this state must not be saved; use the previous checkpoint")
        return dict(saved_tensors(self.sites, self.state.statistics))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take over weights and moments, exactly the keys of :meth:`state_dict`.

        Raises:
            IncompatibleCheckpoint: if keys or shapes differ; the message lists them.
        """
        self.configure_model()
        self.state.statistics = load_tensors(self.sites, self.state.statistics, state_dict)
        return _IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what identifies the run."""
        checkpoint["stableedit"] = {
            **self.identity(),
            "precision": str(self.trainer.precision),
            "committed_turns": self.state.committed_turns,
            "forked_from": self.forked_from,
            "rejected_turns": list(self.state.rejected_turns),
            "update_norms": list(self.state.update_norms),
            "scales": plain_scales(self.state.scales),
            "guards": {name: vars(guard) for name, guard in self.state.guards.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base model or method; take over the position.

        Raises:
            IncompatibleCheckpoint: with a table of what differs.
        """
        self.configure_model()
        stored = stored_identity(checkpoint)
        ours = self.identity()
        stored["fingerprint"] = {**BEFORE_PASSES, **stored["fingerprint"]}
        trainer = self._trainer  # none in load_from_checkpoint
        if trainer is not None and trainer.training:  # captures depend on it; scores may be taken in any
            ours["precision"] = str(trainer.precision)
        asking = trainer is not None and not trainer.training
        refuse_other_run("the checkpoint", stored, ours, remedy=_ASK if asking else GO_ON)
        self.state.committed_turns = stored["committed_turns"]
        self.state.rejected_turns = list(stored["rejected_turns"])
        self.state.update_norms = list(stored["update_norms"])
        self.state.scales = {scope: Scale(**scale) for scope, scale in stored.get("scales", {}).items()}
        self.state.guards = {name: Guard(**guard) for name, guard in stored.get("guards", {}).items()}
        self.forked_from = stored["forked_from"]
        # Lightning stores "that was the last batch"; a stream or horizon that grew since would end at once.
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        progress = loop.get("epoch_loop.batch_progress")
        if progress is not None:
            progress["is_last_batch"] = False
