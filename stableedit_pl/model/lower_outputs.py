"""Outputs of the layers below the first site, kept for prompts that are scored again and again."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stableedit_pl.model.encoding import Encoding


class LowerOutputs:
    """Keeps them on the CPU, token by token without padding, up to a bound; prompts beyond it are run in full.

    Args:
        megabytes: the bound; 0 keeps nothing.
    """

    def __init__(self, megabytes: float) -> None:
        """See the class."""
        self.limit = int(megabytes * 1e6)
        self.bytes = 0
        self._kept: dict[tuple[int, ...], Tensor] = {}

    def find(self, encodings: Sequence[Encoding], device: torch.device) -> Tensor | None:
        """The padded output for a batch, ``[edits, length, hidden]``; None unless all of its prompts are kept."""
        found = [self._kept.get(encoding.input_ids) for encoding in encodings]
        kept = [output for output in found if output is not None]
        if not kept or len(kept) < len(found):
            return None
        # What stands on padding is never attended to.
        return torch.nn.utils.rnn.pad_sequence(kept, batch_first=True).to(device)

    def keep(self, encodings: Sequence[Encoding], output: Tensor) -> None:
        """Take a batch's output, ``[edits, length, hidden]``, as far as there is room."""
        on_cpu: Tensor | None = None
        for row, encoding in enumerate(encodings):
            length = len(encoding.input_ids)
            size = length * output.shape[2] * output.element_size()
            if encoding.input_ids in self._kept or self.bytes + size > self.limit:
                continue
            on_cpu = output.cpu() if on_cpu is None else on_cpu
            self._kept[encoding.input_ids] = on_cpu[row, :length].clone()
            self.bytes += size
