"""Capture: keys and value gradients of every site, from a forward and backward of the frozen model.

The first edited output is made the leaf of the graph. Layers below it run without one, no weight ever needs
a gradient, and the gradients come from ``torch.autograd.grad`` with respect to the sites' outputs alone:
equal, bit for bit, to those of a full backward. Keys and gradients are cut to the answer tokens as they pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableedit_pl.devices.weight_shards import local
from stableedit_pl.method.statistics import Rows
from stableedit_pl.model.encoding import Batch, Encoding, collate
from stableedit_pl.model.micro_batches import MicroBatches
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import Site

LossReduction = Literal["token_sum", "micro_batch_mean"]


@dataclass
class Taps:
    """What the hooks at the sites saw in the forward and backward pass that ran last.

    Attributes:
        batch: the pass's encodings; set it before the forward pass.
        keys: site name to its inputs at the answer tokens, ``[N, d_in]``, detached; the columns that this rank has,
            where ranks divide the site's input. Likewise ``gradients``.
        starts: outputs in which the graph begins.
        gradients: site name to the gradient at its outputs at the answer tokens, ``[N, d_out]``, after the backward.
        squares: site name to the squared norm of its output at the answer tokens, float32 ``[N, 1]``; of the columns
            that this rank has.
    """

    batch: Batch | None = None
    keys: dict[str, Tensor] = field(default_factory=dict)
    starts: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)

    def begin(self, batch: Batch) -> None:
        """Forget the pass before."""
        self.batch = batch
        self.keys, self.starts, self.gradients, self.squares = {}, [], {}, {}

    def see(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Take a site's keys, and have its gradients taken."""
        assert self.batch is not None
        if name in self.keys:
            raise RuntimeError(f"site {name} runs twice in one forward pass: such a shared layer cannot be edited")
        if not output.requires_grad:
            output.requires_grad_(True)
        # Above the first site outputs depend on it, and the backward pass for it comes past them. Where weights have
        # gradients of their own no output is a leaf, and each is asked for.
        if output.is_leaf or not any(start.is_leaf for start in self.starts):
            self.starts.append(output)
        answers = self.batch.on(output.device)
        self.keys[name] = local(inputs).detach()[answers]
        self.squares[name] = local(output).detach()[answers].float().square().sum(dim=1, keepdim=True)
        gradients = self.gradients

        def take(gradient: Tensor) -> None:
            gradients[name] = gradient[answers]

        output.register_hook(take)  # type: ignore[no-untyped-call]


@contextmanager
def tapped(sites: Sequence[Site]) -> Iterator[Taps]:
    """Record what passes the sites while the context lasts; the hooks are gone afterwards, always.

    Yields:
        What was seen; call its ``begin`` before each forward pass.
    """
    taps = Taps()

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            taps.see(name, inputs[0], output)

        return hook

    handles = []
    try:
        for site in sites:
            handles.append(site.module.register_forward_hook(hook_for(site.name)))
        yield taps
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Pass:
    """One forward pass of a turn, for asking the same prompts again.

    Attributes:
        members: which of the turn's edits.
        batch: their encodings.
        lower: output of the layers below the first site; None where it is not kept.
    """

    members: tuple[int, ...]
    batch: Batch
    lower: Tensor | None


@dataclass
class Captured:
    """What one turn's forward and backward gave.

    Attributes:
        rows: site name to its keys and value gradients, float32, rows in the order of the turn's edits.
        measured: per edit, cross entropy summed over its answer tokens before the turn, and the fraction of its answer
            tokens that the model already predicted: float32 ``[2, edits]``, on the device.
        passes: the forward passes.
        squares: site name to the squared norm of its output at each row, float32 ``[N, 1]``.
        margins: probability of each row's answer token less that of the best other token, float32 ``[N, 1]``, on the
            device of ``measured``.
    """

    rows: dict[str, Rows]
    measured: Tensor
    passes: list[Pass] = field(default_factory=list)
    squares: dict[str, Tensor] = field(default_factory=dict)
    margins: Tensor | None = None

    def take(self, measured: list[float]) -> None:
        """Take the elements of ``measured``, read together with other numbers; else the first look waits for them."""
        self._read = measured

    @cached_property
    def _read(self) -> list[float]:
        return self.measured.flatten().tolist()  # type: ignore[no-any-return]

    @property
    def losses(self) -> list[float]:
        """Each edit's summed loss before the turn."""
        return self._read[: self.measured.shape[1]]

    @property
    def correct(self) -> list[float]:
        """Fraction of each edit's answer tokens that the model already predicted."""
        return self._read[self.measured.shape[1] :]

    @property
    def output_norms(self) -> dict[str, Tensor]:
        """Site name to the norm of its output at each row, float32 ``[N]``."""
        return {name: squares[:, 0].sqrt() for name, squares in self.squares.items()}

    @property
    def mean_loss(self) -> float:
        """Mean of the edits' summed losses before the turn."""
        return sum(self.losses) / len(self.losses)


def capture(
    forward: PartialForward,
    sites: Sequence[Site],
    encodings: Sequence[Encoding],
    micro_batches: MicroBatches,
    pad_id: int,
    loss_reduction: LossReduction = "token_sum",
    earlier: Sequence[Pass] | None = None,
) -> Captured:
    """Run the turn's edits through the model and keep what the update needs.

    Args:
        forward: runs the frozen model, which is in eval mode.
        sites: where to capture.
        encodings: the turn's edits, in order.
        micro_batches: which edits go together. With ``token_sum`` the result does not depend on it.
        pad_id: fills padding.
        loss_reduction: ``token_sum``, each answer token's own gradient, or ``micro_batch_mean``, the gradient of
            the mean over a micro-batch's answer tokens (the published program).
        earlier: forward passes of the turn's first capture, for the same micro-batches: their layers below the first
            site, which no planned update changes, are not run again.

    Returns:
        Rows in float32 on the device of each site.

    Raises:
        RuntimeError: if a site takes no part in the forward pass or in the loss.
    """
    keys: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    gradients: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    squares: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    measured: list[Tensor] = []
    margins: list[Tensor] = []
    passes: list[Pass] = []
    with torch.inference_mode(False), torch.enable_grad(), tapped(sites) as taps:
        for place, members in enumerate(micro_batches):
            known = None if earlier is None else earlier[place]
            batch = collate([encodings[i] for i in members], pad_id, forward.device) if known is None else known.batch
            taps.begin(batch)
            if known is None:
                logits, lower = forward.logits_and_lower(batch)
                passes.append(Pass(members, batch, lower))
            else:
                logits = forward.logits(batch, known.lower)
                passes.append(known)
            missing = [site.name for site in sites if site.name not in taps.keys]
            if missing:
                raise RuntimeError(
                    f"no input was seen at {', '.join(missing)}: the model's forward pass skips them, or it is "
                    "compiled (torch.compile drops hooks; edit the uncompiled model)"
                )
            loss, losses, correct = answer_loss(logits, batch, loss_reduction)
            own_margins = answer_margins(logits.detach(), batch)
            del logits
            torch.autograd.grad(loss, taps.starts, allow_unused=True)
            unused = [site.name for site in sites if site.name not in taps.gradients]
            if unused:
                raise RuntimeError(f"the loss does not depend on {', '.join(unused)}: an edit there would do nothing")
            for site in sites:
                keys[site.name].append(taps.keys[site.name].float())
                gradients[site.name].append(taps.gradients[site.name].float())
                squares[site.name].append(taps.squares[site.name])
            measured.append(torch.stack([losses, correct]))
            margins.append(own_margins)
            del loss, losses, correct
    rows = _row_order(encodings, micro_batches)
    edits = torch.tensor([i for members in micro_batches for i in members])
    return Captured(
        {site.name: Rows(_sorted(keys[site.name], rows), _sorted(gradients[site.name], rows)) for site in sites},
        _sorted([part.T for part in measured], edits.argsort()).T,
        passes,
        {site.name: _sorted(squares[site.name], rows) for site in sites},
        _sorted(margins, rows),
    )


def _row_order(encodings: Sequence[Encoding], micro_batches: MicroBatches) -> Tensor:
    """Where the rows of the turn's edits, in order, stand among the rows of the micro-batches, in order."""
    owners = [i for members in micro_batches for i in members for _ in encodings[i].target_ids]
    return torch.tensor(owners).argsort(stable=True)


def _sorted(parts: list[Tensor], order: Tensor) -> Tensor:
    rows = torch.cat(parts)
    if rows.device.type == "cuda":
        order = order.pin_memory().to(rows.device, non_blocking=True)
    return rows[order.to(rows.device)]


@torch.no_grad()
def answer_margins(logits: Tensor, batch: Batch) -> Tensor:
    """How far each answer token is ahead: its probability less that of the best other token.

    Args:
        logits: at the answer tokens, ``[N, vocabulary]``.
        batch: the encodings they belong to.

    Returns:
        float32 ``[N, 1]``, between -1 and 1; positive where it is the model's first choice.
    """
    wanted = batch.labels.to(logits.device)[batch.on(logits.device)].unsqueeze(1)
    rows = logits.float()
    level = rows.logsumexp(dim=1, keepdim=True)
    best = rows.topk(2, dim=1)
    other = torch.where(best.indices[:, :1] == wanted, best.values[:, 1:], best.values[:, :1])
    return (rows.gather(1, wanted) - level).exp() - (other - level).exp()


def answer_loss(logits: Tensor, batch: Batch, loss_reduction: LossReduction) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy at the answer tokens.

    Args:
        logits: at the answer tokens, ``[N, vocabulary]``.
        batch: the encodings they belong to.
        loss_reduction: sum over answer tokens, or their mean.

    Returns:
        The scalar to differentiate; each edit's loss summed over its answer tokens, float32 ``[edits]``; and the
        fraction of its answer tokens that are the model's first choice, float32 ``[edits]``.
    """
    answers, labels = batch.on(logits.device), batch.labels.to(logits.device)
    wanted, rows = labels[answers], logits.float()
    token_loss = F.cross_entropy(rows, wanted, reduction="none")
    total = token_loss.sum() if loss_reduction == "token_sum" else token_loss.mean()
    # Spread over positions before summing: adding rows that share an edit in place is not deterministic on a GPU.
    spread = torch.zeros((3, *labels.shape), dtype=torch.float32, device=logits.device)
    spread[0][answers] = token_loss.detach()
    spread[1][answers] = (rows.detach().argmax(dim=-1) == wanted).float()
    spread[2][answers] = 1.0
    losses, hits, counts = spread.sum(dim=2)
    return total, losses, hits / counts
