"""Sites: the weights that are edited, found by name, and the one place that knows how they are stored."""

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stableedit_pl.devices.weight_shards import WeightShard, local
from stableedit_pl.method.ridge import SiteUpdate
from stableedit_pl.method.workspace import Workspace


class SiteError(ValueError):
    """A site pattern that selects nothing, or something that cannot be edited."""


class Site:
    """One edited weight of a language model, ``d_in -> d_out``.

    ``Linear`` stores its weight as ``[d_out, d_in]`` and ``Conv1D`` (GPT-2) as ``[d_in, d_out]``; an update is
    always ``Delta [d_in, d_out]``. Only this class knows the difference. Where ranks divide the weight (a ``DTensor``),
    everything here but ``d_in``, ``d_out`` and updates is of this rank's shard, and updates are cut to it.

    Attributes:
        name: the module's full name in the base model.
        module: the ``Linear`` or ``Conv1D``.
        shard: which part of the weight this process holds; all of it unless ranks divide it.
        d_in: width of the keys, of the whole weight.
        d_out: width of the value gradients, of the whole weight.
        original: the weight as loaded from the base model, on the CPU, in the weight's layout and dtype; on
            ``meta`` where the model is.
        master: float32 copy of the weight that accumulates updates when the model's own dtype is too coarse,
            in the weight's layout; None when the weight is updated itself.
        master_device: where a loaded master goes, so that a resumed run needs no more memory than a new one; None:
            beside the weight.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        """Adopt a module.

        Args:
            name: its full name.
            module: a ``torch.nn.Linear`` or transformers' ``Conv1D`` with a floating-point weight.

        Raises:
            SiteError: if it is neither, or its weight is quantized.
        """
        weight = getattr(module, "weight", None)
        plain = type(module).__module__.startswith(("torch.nn.modules", "transformers.pytorch_utils"))
        if not isinstance(module, (nn.Linear, Conv1D)) or not plain:
            shape = f" with a weight {list(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else ""
            raise SiteError(
                f"{name} is a {type(module).__name__}{shape}, which cannot be edited: a site is a torch.nn.Linear "
                "or transformers Conv1D. Load quantized models unquantized; fused experts (3-D parameters) have no "
                "single weight to edit."
            )
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype not in _FLOATS:
            dtype = getattr(weight, "dtype", None)
            raise SiteError(
                f"{name} has a weight of dtype {dtype}, which is quantized or fused: load the model in float32, "
                "bfloat16 or float16"
            )
        self.name = name
        self.module = module
        self.transposed = isinstance(module, Conv1D)
        self.shard = WeightShard.of(weight)
        self.d_in, self.d_out = self.shard.shape if self.transposed else self.shard.shape[::-1]
        self.original = local(weight).detach().to("meta" if weight.is_meta else "cpu", copy=True)
        self.master: Tensor | None = None
        self.master_device: torch.device | None = None

    @property
    def weight(self) -> Tensor:
        """The module's weight (this rank's shard), in its own layout, outside autograd."""
        parameter: Tensor = self.module.weight  # type: ignore[assignment]
        return local(parameter).detach()

    @property
    def state(self) -> Tensor:
        """The weight at the precision in which edits accumulate: the master where there is one."""
        return self.weight if self.master is None else self.master

    @torch.no_grad()
    def use_master(self, device: torch.device | str) -> None:
        """Accumulate updates in float32 on ``device`` and round from there, if the model is coarser than that.

        bfloat16 weights written in place lose most of many small updates; rounding from a float32 master
        loses almost nothing.
        """
        if self.weight.dtype in (torch.float32, torch.float64):
            self.master = None
            return
        start = self.weight if self.master is None else self.master
        self.master = start.to(device=device, dtype=torch.float32, copy=True)

    @torch.no_grad()
    def load(self, state: Tensor) -> None:
        """Take over a saved whole weight (the :attr:`state` of another run), any float dtype, the weight's layout.

        A float32 state stays in the master even where the weight is float32 now: the trainer's precision may
        make the weight coarser afterwards.
        """
        state = self.shard.cut(state)
        where = self.weight.device if self.master_device is None else self.master_device
        self.master = state.to(device=where, copy=True) if state.dtype == torch.float32 else None
        self.weight.copy_(state)

    @torch.no_grad()
    def placed(self, update: SiteUpdate) -> SiteUpdate:
        """An update as :meth:`add` takes it: on the device of :attr:`state`, the columns of its factors that meet here.

        Raises:
            ValueError: if it is not an update of a weight ``[d_in, d_out]``.
        """
        shape = (update.left.shape[1], update.right.shape[1])
        if shape != (self.d_in, self.d_out):
            raise ValueError(f"an update of {self.name} is [{self.d_in}, {self.d_out}], got {list(shape)}")
        device = self.state.device
        outputs, inputs = self.shard.rows, self.shard.columns
        if self.transposed:
            inputs, outputs = outputs, inputs
        return SiteUpdate(update.left[:, slice(*inputs)].to(device), update.right[:, slice(*outputs)].to(device))

    @torch.no_grad()
    def add(self, update: SiteUpdate, workspace: Workspace) -> None:
        """``W <- W + Delta^T`` (``Conv1D``: no transpose), through the master where there is one; in place.

        The sum is taken in float64 and rounded once to the precision of :attr:`state`.

        Args:
            update: from :meth:`placed`.
            workspace: on the device of :attr:`state`, large enough for this site and update.
        """
        state = self.state
        for rows, total in workspace.sums(state, update, self.transposed):
            state[rows].copy_(total)
        if self.master is not None:
            self.weight.copy_(self.master)

    @torch.no_grad()
    def stays_in_range(self, update: SiteUpdate, workspace: Workspace) -> Tensor:
        """Whether adding an update keeps the weight in its dtype's range; arguments as :meth:`add`, nothing written.

        Returns:
            A boolean scalar on the device of :attr:`state`, which the host need not wait for.
        """
        state = self.state
        extremes = [torch.stack(total.aminmax()) for _, total in workspace.sums(state, update, self.transposed)]
        # Rounding keeps order: what the extremes round to bounds what the rest does.
        there = torch.stack(extremes) if extremes else torch.zeros(1, device=state.device)
        return self.shard.everywhere(torch.isfinite(there.to(state.dtype).to(self.weight.dtype)).all())

    def is_edited(self) -> bool:
        """Whether the weight in memory is another than the base model's, beyond the rounding to its dtype.

        All ranks must ask where they divide it.
        """
        weight = self.weight.cpu()
        return not bool(self.shard.everywhere(torch.tensor(torch.equal(weight, self.original.to(weight.dtype)))))

    def oriented(self, delta: Tensor) -> Tensor:
        """``Delta [d_in, d_out]`` in the weight's own layout."""
        return delta if self.transposed else delta.T

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Whatever is written to the weight inside is gone afterwards, bit for bit; the master must not be touched."""
        # The weight is its master rounded, always: where there is one, no copy is needed to return.
        before = self.weight.clone() if self.master is None else self.master
        try:
            yield
        finally:
            with torch.no_grad():
                self.weight.copy_(before)

    @torch.no_grad()
    def try_on(self, update: SiteUpdate, so_far: SiteUpdate, workspace: Workspace) -> None:
        """Have the model run with one more planned update, inside :meth:`trial`.

        Args:
            update: on top of what was tried on before, from :meth:`placed`; added where the weight keeps it.
            so_far: all of them together; added to the master where there is one, and rounded from there.
            workspace: on the device of :attr:`state`, large enough for ``so_far``.
        """
        base, added = (self.weight, update) if self.master is None else (self.master, so_far)
        for rows, total in workspace.sums(base, added, self.transposed):
            self.weight[rows].copy_(total)

    @contextmanager
    def original_weight(self) -> Iterator[None]:
        """Run with the base model's weight in place; the edited one returns afterwards, bit for bit."""
        with self.trial():
            with torch.no_grad():
                self.weight.copy_(self.original)
            yield


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def expand_ranges(pattern: str) -> list[str]:
    """Expand ``{a..b}`` ranges: ``"layers.{2..4}.mlp"`` gives three patterns.

    Raises:
        SiteError: if a range runs backwards or is not written ``{a..b}``.
    """
    pieces = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    if any(brace in piece for piece in pieces[0::3] for brace in "{}"):
        raise SiteError(f"site pattern {pattern!r}: a range is written {{first..last}}, as in layers.{{4..7}}.mlp")
    ranges = []
    for first, last in zip(pieces[1::3], pieces[2::3], strict=True):
        if int(first) > int(last):
            raise SiteError(f"site pattern {pattern!r}: range {{{first}..{last}}} runs backwards")
        ranges.append([str(i) for i in range(int(first), int(last) + 1)])
    texts = pieces[0::3]
    return [
        "".join(itertools.chain.from_iterable(zip(texts, (*chosen, ""), strict=True)))
        for chosen in itertools.product(*ranges)
    ]


def resolve_sites(model: nn.Module, patterns: Sequence[str]) -> list[Site]:
    """Find the sites that the patterns name, in the model's own order, each once.

    Args:
        model: the language model.
        patterns: module names, globs (``*.mlp.down_proj``) and ``{a..b}`` ranges.

    Returns:
        The sites.

    Raises:
        SiteError: if a pattern selects no module (the message lists near matches), or one that cannot be edited.
    """
    return [Site(name, model.get_submodule(name)) for name in site_names(model, patterns)]


def site_names(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The names of :func:`resolve_sites`' sites; no weight is looked at, none copied.

    Raises:
        SiteError: if a pattern selects no module, or one whose weight is tied to another's.
    """
    if not patterns:
        raise SiteError("no sites given; name at least one, as in model.layers.31.mlp.down_proj")
    modules = {name: module for name, module in model.named_modules() if name}
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    chosen: set[str] = set()
    for pattern in patterns:
        for expanded in expand_ranges(pattern):
            matches = [name for name in modules if name == expanded or fnmatchcase(name, expanded)]
            if not matches:
                raise SiteError(_no_match(pattern, expanded, modules))
            chosen.update(matches)
    names = [name for name in modules if name in chosen]
    for name in names:
        editable = isinstance(modules[name], (nn.Linear, Conv1D))  # the rest has an error of its own
        shared = holders.get(id(getattr(modules[name], "weight", None)), [])
        if editable and len(shared) > 1:
            raise SiteError(f"{name} cannot be edited alone, its weight is tied: {', '.join(shared)}")
    return names


def editable_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name to ``(d_in, d_out)`` of every module that could be a site, in the model's order."""
    return {
        name: (module.weight.shape[0], module.weight.shape[1])
        if isinstance(module, Conv1D)
        else (module.weight.shape[1], module.weight.shape[0])
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def _no_match(pattern: str, expanded: str, modules: dict[str, nn.Module]) -> str:
    editable = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))]
    wanted = expanded.removesuffix(".weight")
    near = difflib.get_close_matches(wanted, editable, n=5, cutoff=0.5) or editable[-5:]
    within = f" (from {pattern!r})" if expanded != pattern else ""
    there = _numbers_there(wanted, editable)
    return f"site pattern {expanded!r}{within} matches no module of this model{there}. Near matches: " + ", ".join(near)


def _numbers_there(wanted: str, names: list[str]) -> str:
    """Which layers there are, if that is all that is wrong with a name: ``, which has layers 0..29``."""
    pieces = wanted.split(".")
    places = [i for i, piece in enumerate(pieces) if piece.isdigit() and i]
    if not places:
        return ""
    found: dict[int, set[int]] = {place: set() for place in places}
    for name in names:
        own = name.split(".")
        alike = len(own) == len(pieces) and all(
            own[i].isdigit() if i in found else fnmatchcase(own[i], piece) for i, piece in enumerate(pieces)
        )
        for place in places if alike else []:
            found[place].add(int(own[place]))
    wrong = [place for place in places if found[place] and int(pieces[place]) not in found[place]]
    ranges = [f"{pieces[place - 1]} {min(found[place])}..{max(found[place])}" for place in wrong]
    return f", which has {' and '.join(ranges)}" if ranges else ""
