"""A causal language model's forward pass without the parts that nobody needs.

* *Logits at the answer tokens only.* A hook hands the output embeddings nothing but the answer tokens' hidden states,
  so the full ``[tokens, vocabulary]`` logits are never made; what a model does with its logits afterwards (soft
  caps, scales) it does itself.
* *Layers below the first site once.* No edit changes them: their output can be kept, and put in their place in a later
  pass over the same tokens.

Both rest on public interfaces (``get_output_embeddings``, ``nn.ModuleList``) and on how families arrange their layers.
So each is tried on a few tokens and held against the plain forward pass; where it does not give the same, it is not
used.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stableedit_pl.devices import ranks
from stableedit_pl.devices.weight_shards import settle
from stableedit_pl.model.encoding import IGNORED, Batch, Encoding, collate
from stableedit_pl.model.sites import Site

log = logging.getLogger(__name__)


class PartialForward:
    """Runs a model for the logits at its answer tokens.

    Args:
        model: called as ``model(input_ids=..., attention_mask=..., use_cache=False)``.
        head: its output embeddings; None to make all logits and select.
        lower: the layers below the first site, in order; empty to run everything every time.
    """

    def __init__(self, model: Any, head: nn.Module | None = None, lower: Sequence[nn.Module] = ()) -> None:
        """See the class."""
        self.model = model
        self.head = head
        self.lower = tuple(lower)
        self._parts: int | None = None

    @classmethod
    @torch.no_grad()
    def tried(cls, model: Any, sites: Sequence[Site]) -> "PartialForward":
        """What this model allows, found out by trying; logged once.

        Args:
            model: the language model, in eval mode.
            sites: the edited weights.
        """
        batch = _specimen(model)
        plain = cls(model)
        expected = plain.logits(batch)
        together = any(site.shard.sharded for site in sites)
        head = _head(model, sites)
        if head is not None and not _agreed(_same(lambda: cls(model, head).logits(batch), expected), together):
            head = None
        lower = _layers_below(model, sites)
        if lower and not _agreed(_same(lambda: cls(model, head, lower)._twice(batch), expected), together):
            lower = ()
        log.info(
            "Forward pass: logits %s; %s",
            "at answer tokens only" if head is not None else "of all tokens (this model's head cannot be fed in part)",
            f"the {len(lower)} layers below the first site run once per prompt" if lower else "all layers every time",
        )
        way = cls(model, head, lower)
        if lower:
            way.logits_and_lower(batch)  # learns how the layers return their hidden states
        return way

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens."""
        return _entrance(self.model)

    def logits(self, batch: Batch, lower: Tensor | None = None) -> Tensor:
        """Logits at the answer tokens.

        Args:
            batch: padded encodings.
            lower: what :meth:`logits_and_lower` gave for the same tokens; the layers below are not run then.

        Returns:
            ``[N, vocabulary]``, the answer tokens row by row.
        """
        with contextlib.ExitStack() as stack:
            if lower is not None:
                stack.enter_context(self._skipped(lower))
            if self.head is not None:
                stack.enter_context(_fed_in_part(self.head, batch))
            output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        logits: Tensor = output.logits
        return logits[0] if self.head is not None else logits[batch.on(logits.device)]

    def logits_and_lower(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The same, and the output of the last layer below the first site, ``[edits, length, hidden]``, detached."""
        if not self.lower:
            return self.logits(batch), None
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept.append(self._hidden(output).detach())

        handle = self.lower[-1].register_forward_hook(keep)
        try:
            logits = self.logits(batch)
        finally:
            handle.remove()
        return logits, kept[0]

    def _twice(self, batch: Batch) -> Tensor:
        """Logits of a second pass that takes the first one's lower layers; other tokens would give others."""
        _, lower = self.logits_and_lower(batch)
        scrambled = replace(batch, input_ids=batch.input_ids.flip(1))
        return self.logits(scrambled, lower)

    def _hidden(self, output: Any) -> Tensor:
        """A layer's hidden states; some families return them as the first of a tuple (attention weights and the like).

        Raises:
            TypeError: if the layer returns something else.
        """
        if isinstance(output, tuple):
            self._parts = len(output)
            output = output[0]
        if not isinstance(output, Tensor):
            raise TypeError(f"the layer returns a {type(output).__name__}")
        return output

    @contextlib.contextmanager
    def _skipped(self, output: Tensor) -> Iterator[None]:
        """Have the layers below pass their input on, and the last of them give ``output``.

        The modules stay where they are: models ask their layers for attributes while they run.
        """
        before = [layer.__dict__.get("forward") for layer in self.lower]

        def as_layers_do(hidden: Any) -> Any:
            return hidden if self._parts is None else (hidden, *[None] * (self._parts - 1))

        def taken(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            settle(hidden)
            return hidden

        def passed_on(*args: Any, **kwargs: Any) -> Any:
            return as_layers_do(taken(*args, **kwargs))

        def given(*args: Any, **kwargs: Any) -> Any:
            taken(*args, **kwargs)
            return as_layers_do(output)

        try:
            for layer in self.lower:
                layer.forward = given if layer is self.lower[-1] else passed_on
            yield
        finally:
            for layer, old in zip(self.lower, before, strict=True):
                if old is None:
                    layer.__dict__.pop("forward", None)
                else:
                    layer.forward = old


@contextlib.contextmanager
def _fed_in_part(head: nn.Module, batch: Batch) -> Iterator[None]:
    """Hand the output embeddings the answer tokens only, as one sequence."""

    def select(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        return (hidden[batch.on(hidden.device)].unsqueeze(0), *inputs[1:])

    # First of all: tensor parallelism has a hook there of its own, after which the input is no plain tensor.
    handle = head.register_forward_pre_hook(select, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _head(model: Any, sites: Sequence[Site]) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Module) or any(site.module is head for site in sites):
        return None
    return head


def _layers_below(model: nn.Module, sites: Sequence[Site]) -> tuple[nn.Module, ...]:
    """The layers below the first site, where all sites lie in one list of layers."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: dict[str, int] = {}
    for site in sites:
        parts = site.name.split(".")
        prefix = next((".".join(parts[:i]) for i in range(1, len(parts)) if ".".join(parts[:i]) in lists), None)
        if prefix is None:
            return ()
        index = int(parts[prefix.count(".") + 1])
        found[prefix] = min(index, found.get(prefix, index))
    if len(found) != 1:
        return ()
    ((name, first),) = found.items()
    return tuple(lists[name])[:first]


def _specimen(model: Any) -> Batch:
    """A few tokens of unequal length to try things on."""
    vocabulary = model.get_input_embeddings().num_embeddings
    texts = [tuple(range(3, 9)), tuple(range(5, 8))]
    encodings = [
        Encoding(
            tuple(token % vocabulary for token in text),
            (IGNORED,) * (len(text) - 2) + tuple(token % vocabulary for token in text[:2]),
            len(text) - 1,
        )
        for text in texts
    ]
    return collate(encodings, 0, _entrance(model))


def _entrance(model: Any) -> torch.device:
    """Where the first parameter is; those that accelerate keeps in host memory are nowhere between passes."""
    return next(parameter.device for parameter in model.parameters() if not parameter.is_meta)  # type: ignore[no-any-return]


def _agreed(here: bool, together: bool) -> bool:
    """Whether all ranks found so, where they run a forward pass together: they must go the same way."""
    return all(ranks.gather(here)) if together else here


def _same(run: Any, expected: Tensor) -> bool:
    """Whether a way gives what the plain forward pass gives, to the rounding of its dtype."""
    try:
        got = run()
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        log.debug("not possible with this model: %s", error)
        return False
    if got.shape != expected.shape:
        return False
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    difference = (got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    return bool(difference <= tolerance)
