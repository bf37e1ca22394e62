"""Capture: keys and value gradients of every site, from a forward and backward of the frozen model.

The first edited output is made the leaf of the graph. Layers below it run without one, no weight ever needs
a gradient, and the gradients come from ``torch.autograd.grad`` with respect to the sites' outputs alone:
equal, bit for bit, to those of a full backward.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stableedit_pl.encoding import Batch, Encoding, chunks, collate
from stableedit_pl.sites import Site
from stableedit_pl.statistics import Rows

LossReduction = Literal["token_sum", "micro_batch_mean"]


@dataclass
class Tap:
    """A site's input and output in the forward pass that ran last.

    Attributes:
        inputs: ``[edits, length, d_in]``, detached.
        output: ``[edits, length, d_out]``, part of the graph.
    """

    inputs: Tensor
    output: Tensor


@contextmanager
def tapped(sites: Sequence[Site]) -> Iterator[dict[str, Tap]]:
    """Record the sites' inputs and outputs while the context lasts; the hooks are gone afterwards, always.

    Yields:
        Site name to its tap, filled by a forward pass; clear it before the next.
    """
    taps: dict[str, Tap] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name in taps:
                raise RuntimeError(f"site {name} runs twice in one forward pass: such a shared layer cannot be edited")
            if not output.requires_grad:
                output.requires_grad_(True)
            taps[name] = Tap(inputs[0].detach(), output)

        return hook

    handles = []
    try:
        for site in sites:
            handles.append(site.module.register_forward_hook(hook_for(site.name)))
        yield taps
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Captured:
    """What one turn's forward and backward gave.

    Attributes:
        rows: site name to its keys and value gradients, float32, rows in the order of the turn's edits.
        losses: cross entropy summed over each edit's answer tokens before the turn, one float per edit.
        correct: fraction of each edit's answer tokens that the model already predicted, one float per edit.
    """

    rows: dict[str, Rows]
    losses: list[float] = field(default_factory=list)
    correct: list[float] = field(default_factory=list)

    @property
    def mean_loss(self) -> float:
        """Mean of the edits' summed losses before the turn."""
        return sum(self.losses) / len(self.losses)


def capture(
    model: nn.Module,
    sites: Sequence[Site],
    encodings: Sequence[Encoding],
    micro_batch_size: int,
    pad_id: int,
    loss_reduction: LossReduction = "token_sum",
) -> Captured:
    """Run the turn's edits through the model and keep what the update needs.

    Args:
        model: frozen causal language model in eval mode, called as ``model(input_ids, attention_mask)``.
        sites: where to capture.
        encodings: the turn's edits, in order.
        micro_batch_size: edits per forward pass. With ``token_sum`` the result does not depend on it.
        pad_id: fills padding.
        loss_reduction: ``token_sum``, each answer token's own gradient, or ``micro_batch_mean``, the gradient of
            the mean over a micro-batch's answer tokens (the published program).

    Returns:
        Rows in float32 on the device of each site.

    Raises:
        RuntimeError: if a site takes no part in the forward pass or in the loss.
    """
    device = next(model.parameters()).device
    keys: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    gradients: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    losses: list[Tensor] = []
    correct: list[Tensor] = []
    with torch.inference_mode(False), torch.enable_grad(), tapped(sites) as taps:
        for piece in chunks(encodings, micro_batch_size):
            batch = collate(piece, pad_id, device)
            taps.clear()
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            missing = [site.name for site in sites if site.name not in taps]
            if missing:
                raise RuntimeError(
                    f"no input was seen at {', '.join(missing)}: the model's forward pass skips them, or it is "
                    "compiled (torch.compile drops hooks; edit the uncompiled model)"
                )
            loss, token_losses, hits = answer_loss(output.logits, batch, loss_reduction)
            outputs = [taps[site.name].output for site in sites]
            for site, gradient in zip(sites, torch.autograd.grad(loss, outputs), strict=True):
                answers = batch.answers.to(gradient.device)
                keys[site.name].append(taps[site.name].inputs[answers].float())
                gradients[site.name].append(gradient[answers].float())
            losses.append(token_losses.sum(dim=1))
            correct.append(hits.sum(dim=1) / batch.answers.to(hits.device).sum(dim=1))
            del output, loss, outputs
    rows = {site.name: Rows(torch.cat(keys[site.name]), torch.cat(gradients[site.name])) for site in sites}
    return Captured(rows, torch.cat(losses).tolist(), torch.cat(correct).tolist())


def answer_loss(logits: Tensor, batch: Batch, loss_reduction: LossReduction) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy at the answer tokens.

    Args:
        logits: ``[edits, length, vocabulary]``.
        batch: the encodings they belong to.
        loss_reduction: sum over answer tokens, or their mean.

    Returns:
        The scalar to differentiate; the loss per position, float32 ``[edits, length]``, zero off the answer
        tokens; and whether each position's answer token is the model's first choice, float32 ``[edits, length]``.
    """
    answers = batch.answers.to(logits.device)
    labels = batch.labels.to(logits.device)[answers]
    rows = logits[answers].float()
    token_loss = F.cross_entropy(rows, labels, reduction="none")
    total = token_loss.sum() if loss_reduction == "token_sum" else token_loss.mean()
    per_position = torch.zeros(answers.shape, dtype=torch.float32, device=logits.device)
    per_position[answers] = token_loss.detach()
    hits = torch.zeros(answers.shape, dtype=torch.float32, device=logits.device)
    hits[answers] = (rows.argmax(dim=-1) == labels).float()
    return total, per_position, hits
