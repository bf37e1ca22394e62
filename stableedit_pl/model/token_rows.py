"""Which rows of what passes a site belong to which tokens."""

from torch import Tensor

from stableedit_pl.model.encoding import Batch
from stableedit_pl.model.sites import SiteError


def token_index(name: str, batch: Batch, inputs: Tensor, output: Tensor) -> tuple[Tensor, ...]:
    """Where the answer tokens are in a site's inputs and outputs.

    Args:
        name: the site's, for the message.
        batch: what passes the model.
        inputs: ``[edits, length, width]``, or ``[edits * length, width]``, one edit after another: some families put
            all tokens in a row before their feed-forward layers (OPT), or their experts.
        output: likewise.

    Returns:
        An index for both, on the device of ``output``.

    Raises:
        SiteError: if they are neither: then what belongs to which token cannot be told.
    """
    edits, length = batch.input_ids.shape
    shapes = {tuple(tensor.shape[:-1]) for tensor in (inputs, output)}
    rows, positions = batch.on(output.device)
    if shapes == {(edits, length)}:
        return rows, positions
    if shapes == {(edits * length,)}:
        return (rows * length + positions,)
    raise SiteError(
        f"{name} cannot be edited: for {edits} prompts of {length} tokens it is given {list(inputs.shape)} and gives "
        f"{list(output.shape)}, where [{edits}, {length}, width] or [{edits * length}, width] can be traced to tokens "
        "(an expert that sees some tokens only, say, cannot). Choose another site of the layer."
    )
