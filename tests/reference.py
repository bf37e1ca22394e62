"""The editing method, slow and obviously right: the oracle the fast code is held against.

Everything here is float64, one edit at a time, and written from the definitions: moments keep every row ever seen,
the ridge solution is least squares on augmented rows, the inverse root is a full eigendecomposition. Nothing is
imported from the package under test.

Vocabulary, for one site (an edited weight mapping ``d_in -> d_out``) and one turn with ``N`` answer tokens:

==============================  ===============  =====================================================
keys ``K``                      [N, d_in]        the site's inputs at the answer tokens, raw
value gradients ``G``           [N, d_out]       gradient of the loss at the site's outputs there
count ``n``                     integer          rows seen so far, the current turn included
``Psi``                         [d_out, d_out]   scatter of the value gradients, ``sum (g - mean)(g - mean)^T``
``k^``, ``g~``                  like K, G        normalized keys and value gradients
targets ``V``                   [N, d_out]       ``V_i = -step_size ||k^_i||^2 g~_i``
``Delta``                       [d_in, d_out]    ``argmin ||K Delta - V||^2 + ridge ||Delta||^2``
==============================  ===============  =====================================================

One turn: capture K and G of all sites from the model as it stands, add the rows to the moments, normalize, targets,
ridge, write. Moments therefore always include the turn that they normalize. A further pass over the turn captures again
with the weights as planned so far, and takes only as much of each row's target as is left to do; the moments stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

EPS = torch.finfo(torch.float32).eps
"""Machine epsilon of float32: part of the method, therefore not float64's although all arithmetic here is."""

IGNORED = -100
"""Label of a position that predicts no answer token."""

Normalization = Literal["whiten", "standardize", "none"]
LossReduction = Literal["token_sum", "micro_batch_mean"]
StatisticsScope = Literal["site", "shape"]
WarmUpMode = Literal["edit", "statistics_only"]
Edit = tuple[str, str]  # (prompt, target)
Encoded = tuple[list[int], list[int]]  # (input ids, labels), equally long


# ---------------------------------------------------------------------------------------------------------- encoding


def is_bare_space(tokenizer: Any, token_id: int) -> bool:
    """Whether a token is nothing but sentencepiece's space mark, e.g. the first token of ``_ _Paris``."""
    return set(tokenizer.convert_ids_to_tokens(token_id)) == {"\u2581"}


def encode(tokenizer: Any, prompt: str, target: str, skip_bare_space: bool = True) -> Encoded:
    """Token ids of one edit, and at each position the target token to be predicted there.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: encoded with special tokens.
        target: encoded after one space, without special tokens.
        skip_bare_space: keep bare space tokens of the target in the inputs but do not count them as answer tokens
            (parity mode counts them).

    Returns:
        Input ids without the last target token, and labels of the same length: ``labels[t]`` is the token that
        follows input ``t`` where that is an answer token, ``-100`` elsewhere.

    Raises:
        ValueError: if no answer token is left to predict.
    """
    prompt_ids = list(tokenizer(prompt)["input_ids"])
    target_ids = list(tokenizer(" " + target, add_special_tokens=False)["input_ids"])
    ids = prompt_ids + target_ids
    labels = []
    for position in range(len(ids) - 1):
        following = ids[position + 1]
        is_target = position + 1 >= len(prompt_ids)
        is_skipped = skip_bare_space and is_bare_space(tokenizer, following)
        labels.append(following if is_target and not is_skipped else IGNORED)
    if all(label == IGNORED for label in labels):
        raise ValueError(f"no answer token to predict: prompt {prompt!r}, target {target!r}")
    return ids[:-1], labels


# ----------------------------------------------------------------------------------------------------------- capture


class Float64Throughout(TorchFunctionMode):
    """Turn float32 islands inside a float64 model into float64.

    Language models normalize, and take softmax, in float32 whatever their dtype. Inside a float64 model that *lowers*
    the precision to 1e-7: enough to spoil finite differences, and whitening amplifies it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` with every mention of float32 replaced by float64."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        widened_args = [torch.float64 if value is torch.float32 else value for value in args]
        widened_kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*widened_args, **widened_kwargs)


def answer_count(labels: Sequence[int]) -> int:
    """Number of answer tokens of one edit."""
    return sum(label != IGNORED for label in labels)


def float64_copy(model: nn.Module, site_modules: dict[str, nn.Module]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A float64 copy of the model in eval mode, and the copies of its sites; the model itself is left alone."""
    path_of = {id(module): path for path, module in model.named_modules()}
    double = copy.deepcopy(model).double().eval().requires_grad_(True)
    return double, {name: double.get_submodule(path_of[id(site)]) for name, site in site_modules.items()}


@contextmanager
def recorded(sites: dict[str, nn.Module]) -> Generator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """While open, keep what each site was given and what it gave: two dicts of [1, tokens, d_in or d_out]."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if name in outputs:
                raise RuntimeError(f"site {name} ran twice in one forward pass")
            inputs[name], outputs[name] = args[0], output

        return hook

    handles = [site.register_forward_hook(keep(name)) for name, site in sites.items()]
    try:
        yield inputs, outputs
    finally:
        for handle in handles:
            handle.remove()


def answer_loss(model: nn.Module, encoded: Encoded) -> Tensor:
    """Negative log likelihood summed over the answer tokens of one edit, a float64 scalar; no padding, no batch."""
    input_ids, labels = encoded
    with Float64Throughout():
        logits = model(input_ids=torch.tensor([input_ids]), use_cache=False).logits[0]
        log_probabilities = torch.log_softmax(logits, dim=-1)
    terms = [-log_probabilities[position, label] for position, label in enumerate(labels) if label != IGNORED]
    return torch.stack(terms).sum()


def capture_edit(
    model: nn.Module, sites: dict[str, nn.Module], encoded: Encoded
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Keys and gradients of the *summed* loss of one edit, at its answer tokens.

    Args:
        model: float64, in eval mode.
        sites: modules of that model, by name.
        encoded: one edit.

    Returns:
        For each site (keys [answer tokens, d_in], gradients [answer tokens, d_out]), and the summed loss.
    """
    with recorded(sites) as (inputs, outputs):
        loss = answer_loss(model, encoded)
    gradients = torch.autograd.grad(loss, [outputs[name] for name in sites])
    answers = [position for position, label in enumerate(encoded[1]) if label != IGNORED]
    rows = {
        name: (inputs[name][0, answers].detach(), gradient[0, answers])
        for name, gradient in zip(sites, gradients, strict=True)
    }
    return rows, loss.item()


def capture(
    model: nn.Module,
    site_modules: dict[str, nn.Module],
    encoded: list[Encoded],
    loss_reduction: LossReduction,
    micro_batch_size: int,
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[float]]:
    """Step 1: keys and value gradients of a turn, one edit at a time.

    ``token_sum``: the loss is the sum over all answer tokens of the turn. Edits do not see each other, so this is
    each edit's own sum. ``micro_batch_mean``: the loss of each chunk of ``micro_batch_size`` consecutive edits is
    its mean over the chunk's answer tokens: the same gradients divided by the chunk's number of answer tokens.

    Args:
        model: a causal language model of any dtype; not changed.
        site_modules: ``Linear`` or ``Conv1D`` modules of the model, by name.
        encoded: the turn's edits, in the order in which they are chunked.
        loss_reduction: which loss the gradients belong to.
        micro_batch_size: edits per chunk; of no consequence for ``token_sum``.

    Returns:
        For each site (keys [N, d_in], gradients [N, d_out]) in the order of the edits, and each edit's mean negative
        log likelihood per answer token, whatever the reduction.
    """
    double, sites = float64_copy(model, site_modules)
    keys: dict[str, list[Tensor]] = {name: [] for name in sites}
    gradients: dict[str, list[Tensor]] = {name: [] for name in sites}
    losses = []
    for start in range(0, len(encoded), micro_batch_size):
        chunk = encoded[start : start + micro_batch_size]
        chunk_answers = sum(answer_count(labels) for _, labels in chunk)
        divisor = {"token_sum": 1, "micro_batch_mean": chunk_answers}[loss_reduction]
        for edit in chunk:
            rows, loss = capture_edit(double, sites, edit)
            for name, (edit_keys, edit_gradients) in rows.items():
                keys[name].append(edit_keys)
                gradients[name].append(edit_gradients / divisor)
            losses.append(loss / answer_count(edit[1]))
    return {name: (torch.cat(keys[name]), torch.cat(gradients[name])) for name in sites}, losses


# ----------------------------------------------------------------------------------------------------------- moments


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of rows.

    Attributes:
        count: rows seen, ``n``.
        mean: [d].
        scatter: sum of squared deviations, not divided by anything: [d] if diagonal, [d, d] if full.
    """

    count: int
    mean: Tensor
    scatter: Tensor


class Statistics:
    """Step 2: the lifelong normalization statistics, as all rows ever seen.

    Args:
        d_in: width of the keys.
        d_out: width of the value gradients.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        """Start with no rows."""
        self.keys = torch.empty(0, d_in, dtype=torch.float64)
        self.gradients = torch.empty(0, d_out, dtype=torch.float64)

    def add(self, keys: Tensor, gradients: Tensor) -> None:
        """Append rows: keys [m, d_in] and value gradients [m, d_out]."""
        self.keys = torch.cat([self.keys, keys.double()])
        self.gradients = torch.cat([self.gradients, gradients.double()])

    @property
    def count(self) -> int:
        """Rows seen."""
        return len(self.keys)

    def key_moments(self) -> Moments:
        """Count, mean [d_in] and diagonal scatter ``M2_k`` [d_in] of the keys."""
        mean = mean_of(self.keys)
        return Moments(self.count, mean, ((self.keys - mean) ** 2).sum(0))

    def gradient_moments(self) -> Moments:
        """Count, mean [d_out] and full scatter ``Psi`` [d_out, d_out] of the value gradients."""
        mean = mean_of(self.gradients)
        deviations = self.gradients - mean
        return Moments(self.count, mean, deviations.T @ deviations)


def mean_of(rows: Tensor) -> Tensor:
    """Mean of rows [n, d], as a shift from the first: exact for identical rows, whose scatter is then exactly 0."""
    return rows[0] + (rows - rows[0]).mean(0)


# ----------------------------------------------------------------------------------------------------- normalization


def divide_by_rms(rows: Tensor) -> Tensor:
    """Each row over the root mean square of its own entries, ``x / rms(x)``; a zero row stays zero."""
    normalized = torch.zeros_like(rows)
    for index, row in enumerate(rows):
        rms = (row**2).mean().sqrt()
        if rms > 0:
            normalized[index] = row / rms
    return normalized


def standardize(rows: Tensor, count: int, mean: Tensor, squared_deviations: Tensor) -> Tensor:
    """``(x - mean) / (sigma + eps)`` with ``sigma^2 = M2 / (n - 1)`` per dimension; all of width d."""
    sigma = (squared_deviations / (count - 1)).sqrt()
    return (rows - mean) / (sigma + EPS)


def gradient_covariance(psi: Tensor, count: int, prior_strength: float) -> Tensor:
    """Point estimate ``Sigma`` of the covariance of the value gradients.

    With the proper prior, ``Sigma = (Psi + p tau I) / (n + p)``, ``tau = trace(Psi) / (n d_out)``,
    ``p = prior_strength * d_out``; with the improper one (``prior_strength`` 0), ``Psi / (n - d_out - 1)``.

    Args:
        psi: scatter [d_out, d_out].
        count: rows in it.
        prior_strength: pseudo-observations of the average direction, per dimension.

    Returns:
        ``Sigma`` [d_out, d_out].
    """
    d_out = len(psi)
    if prior_strength == 0:
        return psi / (count - d_out - 1)
    pseudo_count = prior_strength * d_out
    tau = psi.trace() / (count * d_out)
    return (psi + pseudo_count * tau * torch.eye(d_out, dtype=torch.float64)) / (count + pseudo_count)


def inverse_root(sigma: Tensor, eigenvalue_floor: float) -> Tensor:
    """Symmetric ``Sigma^{-1/2}``: a root that also rotates would be another method.

    Args:
        sigma: [d, d], symmetric.
        eigenvalue_floor: eigenvalues are clamped from below by ``max(eigenvalue_floor, eps * largest eigenvalue)``:
            directions in which nothing was ever seen must not be divided by a rounding error.

    Returns:
        [d, d], symmetric and positive definite.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(sigma)
    clamped = eigenvalues.clamp(min=max(eigenvalue_floor, EPS * eigenvalues.max().item()))
    root: Tensor = eigenvectors @ torch.diag(clamped**-0.5) @ eigenvectors.T
    return root


def whiten(gradients: Tensor, moments: Moments, prior_strength: float, eigenvalue_floor: float) -> Tensor:
    """``g~ = Sigma^{-1/2} (g - mean_g)`` for rows [N, d_out]; zero where no gradient ever differed from another."""
    if moments.scatter.trace() == 0:
        return torch.zeros_like(gradients)
    root = inverse_root(gradient_covariance(moments.scatter, moments.count, prior_strength), eigenvalue_floor)
    return torch.stack([root @ (gradient - moments.mean) for gradient in gradients])


def normalize(
    keys: Tensor,
    gradients: Tensor,
    statistics: Statistics,
    *,
    normalization: Normalization,
    prior_strength: float,
    eigenvalue_floor: float,
) -> tuple[Tensor, Tensor]:
    """Step 3: normalized keys and value gradients of a turn.

    Args:
        keys: [N, d_in].
        gradients: [N, d_out].
        statistics: all rows so far, these included.
        normalization: ``whiten`` (keys standardized, gradients whitened), ``standardize`` (both), ``none`` (as is).
        prior_strength: pseudo-observations of the prior per dimension. 0 is the improper prior, under which gradients
            are standardized until ``n > d_out + 1``.
        eigenvalue_floor: absolute lower bound of the eigenvalues of ``Sigma``.

    Returns:
        ``k^`` [N, d_in] and ``g~`` [N, d_out].

    Raises:
        ValueError: if the normalization has another name.
    """
    if normalization not in ("whiten", "standardize", "none"):
        raise ValueError(f"normalization must be whiten, standardize or none, got {normalization!r}")
    if normalization == "none":
        return keys, gradients
    if statistics.count < 2:  # one row has no spread to be measured in
        return divide_by_rms(keys), divide_by_rms(gradients)

    key_moments, moments = statistics.key_moments(), statistics.gradient_moments()
    khat = standardize(keys, key_moments.count, key_moments.mean, key_moments.scatter)
    d_out = gradients.shape[1]
    covariance_undefined = prior_strength == 0 and moments.count <= d_out + 1
    if normalization == "standardize" or covariance_undefined:
        return khat, standardize(gradients, moments.count, moments.mean, moments.scatter.diagonal())
    return khat, whiten(gradients, moments, prior_strength, eigenvalue_floor)


# ---------------------------------------------------------------------------------------------------------- solution


def targets(khat: Tensor, gtilde: Tensor, step_size: float) -> Tensor:
    """Step 4: ``V_i = -step_size * ||k^_i||^2 * g~_i``, row by row: [N, d_in], [N, d_out] -> [N, d_out]."""
    return torch.stack([-step_size * k.dot(k) * g for k, g in zip(khat, gtilde, strict=True)])


def ridge_update(keys: Tensor, values: Tensor, ridge: float) -> Tensor:
    """Step 5: ``Delta = argmin ||K Delta - V||^2 + ridge ||Delta||^2``, for ``ridge > 0``.

    Ridge regression is ordinary least squares on ``d_in`` more rows, ``sqrt(ridge) I`` with target 0.

    Args:
        keys: raw keys ``K`` [N, d_in], not the normalized ones: the update acts on what the site really receives.
        values: targets ``V`` [N, d_out].
        ridge: strength of the penalty.

    Returns:
        ``Delta`` [d_in, d_out], float64.

    Raises:
        ValueError: if the penalty is not positive.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    d_in, d_out = keys.shape[1], values.shape[1]
    rows = torch.cat([keys.double(), ridge**0.5 * torch.eye(d_in, dtype=torch.float64)])
    right_hand_side = torch.cat([values.double(), torch.zeros(d_in, d_out, dtype=torch.float64)])
    delta: Tensor = torch.linalg.lstsq(rows, right_hand_side, driver="gelsd").solution
    return delta


# -------------------------------------------------------------------------------------------------------------- runs


def weight_of(site: nn.Module) -> Tensor:
    """The edited weight of a site.

    Args:
        site: a ``Linear`` or a ``Conv1D``.

    Returns:
        [d_out, d_in] for a ``Linear``, [d_in, d_out] for a ``Conv1D``.

    Raises:
        TypeError: if it is neither.
    """
    if not isinstance(site, (nn.Linear, Conv1D)):
        raise TypeError(f"a site must be a Linear or a Conv1D, got {type(site).__name__}")
    return site.weight


def site_shape(site: nn.Module) -> tuple[int, int]:
    """``(d_in, d_out)`` of a site, whichever way round it stores its weight."""
    rows, columns = weight_of(site).shape
    return (rows, columns) if isinstance(site, Conv1D) else (columns, rows)


def in_weight_layout(site: nn.Module, delta: Tensor) -> Tensor:
    """``Delta`` [d_in, d_out] as the site stores its weight: ``Linear`` transposed, ``Conv1D`` as it is."""
    return delta if isinstance(site, Conv1D) else delta.T


class TurnResult(NamedTuple):
    """What one turn did.

    Attributes:
        is_warmup: whether it came from the warm-up stream.
        deltas: per site, ``Delta`` as solved, before any rounding, in the weight's own layout; zeros if none was due.
        applied: per site, weight after minus weight before: differs from ``deltas`` when weights are rounded.
        losses: each edit's mean negative log likelihood per answer token before the turn, in the order of processing.
    """

    is_warmup: bool
    deltas: dict[str, Tensor]
    applied: dict[str, Tensor]
    losses: list[float]


class RunResult(NamedTuple):
    """What a whole run did.

    Attributes:
        accumulated: per site, final weight minus first weight, float64, in the weight's own layout.
        turns: every turn in order, warm-up first.
    """

    accumulated: dict[str, Tensor]
    turns: list[TurnResult]


class Scale(NamedTuple):
    """Step size and ridge of one site, absolute."""

    step_size: float
    ridge: float


def found_scales(
    sites: dict[str, nn.Module],
    rows: dict[str, tuple[Tensor, Tensor]],
    statistics: dict[str, Statistics],
    relative_step: float,
    relative_ridge: float,
    **method: Any,
) -> dict[str, Scale]:
    """Absolute settings of a turn: sites that share moments share them, their rows being taken together.

    Args:
        sites: the edited modules, as they were when the rows were captured.
        rows: per site, keys [N, d_in] and gradients [N, d_out].
        statistics: per site, moments that already hold these rows.
        relative_step: mean norm of what the update adds at the rows / mean norm of the sites' outputs there.
        relative_ridge: ridge / mean squared norm of the rows' keys.
        method: see :func:`turn_updates`.
    """
    found = {}
    for name in sites:
        members = [other for other in sites if statistics[other] is statistics[name]]
        ridge = relative_ridge * torch.cat([rows[m][0].square().sum(dim=1) for m in members]).mean().item()
        unit = turn_updates(
            {m: sites[m] for m in members},
            {m: rows[m] for m in members},
            statistics,
            scales={m: Scale(1.0, ridge) for m in members},
            **method,
        )
        added, outputs = [], []
        for m in members:
            delta = unit[m] if isinstance(sites[m], Conv1D) else unit[m].T
            added += [(key @ delta).norm() for key in rows[m][0]]
            outputs += [sites[m](key.unsqueeze(0)).detach().norm() for key in rows[m][0]]
        step = relative_step * torch.stack(outputs).mean() / torch.stack(added).mean()
        found[name] = Scale(step.item(), ridge)
    return found


def what_is_left(model: nn.Module, encoded: Sequence[Encoded], enough_margin: float) -> Tensor:
    """Of each answer token's target, [N]: 1 up to four fifths of the margin, from there linearly to 0 at the margin."""
    left = []
    for input_ids, labels in encoded:
        with Float64Throughout(), torch.no_grad():
            probabilities = torch.softmax(model(input_ids=torch.tensor([input_ids])).logits[0], dim=-1)
        for position, label in enumerate(labels):
            if label != IGNORED:
                others = torch.cat([probabilities[position, :label], probabilities[position, label + 1 :]])
                margin = (probabilities[position, label] - others.max()).item()
                left.append(min(1.0, max(0.0, 5.0 * (1.0 - margin / enough_margin))))
    return torch.tensor(left, dtype=torch.float64)


def turn_updates(
    sites: dict[str, nn.Module],
    rows: dict[str, tuple[Tensor, Tensor]],
    statistics: dict[str, Statistics],
    *,
    normalization: Normalization,
    scales: dict[str, Scale],
    prior_strength: float,
    eigenvalue_floor: float,
    left: Tensor | None = None,
) -> dict[str, Tensor]:
    """Steps 3 to 5 for every site, once the turn's rows are in the moments.

    Args:
        sites: the edited modules.
        rows: per site, keys [N, d_in] and gradients [N, d_out].
        statistics: per site, moments that already hold these rows; several sites may share one.
        normalization: see :func:`normalize`.
        scales: per site, its step size and ridge.
        prior_strength: see :func:`normalize`.
        eigenvalue_floor: see :func:`normalize`.
        left: how much of each row's target is taken, [N], from :func:`what_is_left`; ``None``: all of it.

    Returns:
        Per site, the update in the weight's own layout.
    """
    updates = {}
    for name, (keys, gradients) in rows.items():
        khat, gtilde = normalize(
            keys,
            gradients,
            statistics[name],
            normalization=normalization,
            prior_strength=prior_strength,
            eigenvalue_floor=eigenvalue_floor,
        )
        values = targets(khat, gtilde, scales[name].step_size)
        if left is not None:
            values = torch.stack([share * value for share, value in zip(left, values, strict=True)])
        delta = ridge_update(keys, values, scales[name].ridge)
        updates[name] = in_weight_layout(sites[name], delta)
    return updates


def scoped_statistics(sites: dict[str, nn.Module], scope: StatisticsScope) -> dict[str, Statistics]:
    """One :class:`Statistics` for each site, or one shared by all sites of a ``(d_in, d_out)``."""
    shared: dict[Any, Statistics] = {}
    for name, site in sites.items():
        group = {"site": name, "shape": site_shape(site)}[scope]
        shared.setdefault(group, Statistics(*site_shape(site)))
    return {name: shared[{"site": name, "shape": site_shape(site)}[scope]] for name, site in sites.items()}


def reference_run(
    model: nn.Module,
    tokenizer: Any,
    site_names: Sequence[str],
    turns: Sequence[Sequence[Edit]],
    *,
    normalization: Normalization = "whiten",
    step_size: float = 1e-6,
    ridge: float = 10.0,
    relative_step: float | None = None,
    relative_ridge: float | None = None,
    passes: int = 1,
    enough_margin: float = 1.0,
    prior_strength: float = 1.0,
    eigenvalue_floor: float = 0.0,
    statistics_scope: StatisticsScope = "site",
    loss_reduction: LossReduction = "token_sum",
    micro_batch_size: int = 10,
    sort_edits_by_length: bool = False,
    skip_bare_space: bool = True,
    warmup_turns: Sequence[Sequence[Edit]] = (),
    warmup_mode: WarmUpMode = "edit",
    warmup_normalization: Normalization | None = None,
    round_weights_to: torch.dtype | None = None,
) -> RunResult:
    """Edit a copy of a model with a whole stream, turn after turn.

    Args:
        model: a causal language model; not changed.
        tokenizer: its tokenizer.
        site_names: full module names of the edited ``Linear`` and ``Conv1D`` modules.
        turns: the target stream, each turn a list of (prompt, target).
        normalization: see :func:`normalize`.
        step_size: see :func:`targets`.
        ridge: see :func:`ridge_update`.
        relative_step: instead of both, with ``relative_ridge``: see :func:`found_scales`; found anew in each turn until
            the moments have ``d_out`` rows.
        relative_ridge: see ``relative_step``.
        passes: over each turn's edits, each with the weights as planned by those before.
        enough_margin: see :func:`what_is_left`; a turn ends when nothing is.
        prior_strength: see :func:`normalize`.
        eigenvalue_floor: see :func:`normalize`.
        statistics_scope: ``site``: moments for each site; ``shape``: one set for all sites of a shape.
        loss_reduction: see :func:`capture`.
        micro_batch_size: see :func:`capture`.
        sort_edits_by_length: parity: order edits by decreasing encoded length (stable) inside each turn.
        skip_bare_space: see :func:`encode`; ``False`` for parity.
        warmup_turns: turns taken before the target stream.
        warmup_mode: ``edit``: warm-up turns change weights too; ``statistics_only``: only the moments.
        warmup_normalization: normalization of warm-up turns; ``None``: as all others.
        round_weights_to: parity: dtype in which weights are stored, and so rounded, after each turn; ``None``: float64.

    Returns:
        The accumulated update of each site, and a record of each turn.
    """
    double, sites = float64_copy(model, {name: model.get_submodule(name) for name in site_names})
    statistics = scoped_statistics(sites, statistics_scope)
    first_weights = {name: weight_of(site).detach().clone() for name, site in sites.items()}
    results = []
    kept: dict[str, Scale] = {}

    def take(turn: Sequence[Edit], is_warmup: bool) -> TurnResult:
        encoded = [encode(tokenizer, prompt, target, skip_bare_space) for prompt, target in turn]
        if sort_edits_by_length:
            encoded = sorted(encoded, key=lambda edit: -len(edit[0]))
        rows, losses = capture(double, sites, encoded, loss_reduction, micro_batch_size)
        # Every site's rows go in before any site is normalized: sites of one shape may share their moments.
        for name, (keys, gradients) in rows.items():
            statistics[name].add(keys, gradients)
        if is_warmup and warmup_mode == "statistics_only":
            nothing = {name: torch.zeros_like(weight) for name, weight in first_weights.items()}
            return TurnResult(is_warmup, nothing, nothing, losses)
        method: Any = {
            "normalization": (warmup_normalization if is_warmup else None) or normalization,
            "prior_strength": prior_strength,
            "eigenvalue_floor": eigenvalue_floor,
        }
        scales = {name: Scale(step_size, ridge) for name in sites}
        if relative_step is not None and relative_ridge is not None:
            scales = kept or found_scales(sites, rows, statistics, relative_step, relative_ridge, **method)
            if all(len(statistics[name].keys) >= site_shape(sites[name])[1] for name in sites):
                kept.update(scales)
        before = {name: weight_of(site).detach().clone() for name, site in sites.items()}
        deltas = turn_updates(sites, rows, statistics, scales=scales, **method)
        for _ in range(passes - 1):
            for name, delta in deltas.items():
                with torch.no_grad():
                    weight_of(sites[name]).copy_(before[name] + delta)
            left = what_is_left(double, encoded, enough_margin)
            if not left.any():
                break
            again, _ = capture(double, sites, encoded, loss_reduction, micro_batch_size)
            more = turn_updates(sites, again, statistics, scales=scales, left=left, **method)
            deltas = {name: delta + more[name] for name, delta in deltas.items()}
        for name, weight in before.items():
            with torch.no_grad():
                weight_of(sites[name]).copy_(weight)
        applied = {name: write(sites[name], delta, round_weights_to) for name, delta in deltas.items()}
        return TurnResult(is_warmup, deltas, applied, losses)

    for turn in warmup_turns:
        results.append(take(turn, is_warmup=True))
    for turn in turns:
        results.append(take(turn, is_warmup=False))
    accumulated = {name: weight_of(site).detach() - first_weights[name] for name, site in sites.items()}
    return RunResult(accumulated, results)


def write(site: nn.Module, delta: Tensor, round_to: torch.dtype | None) -> Tensor:
    """``W <- W + delta`` (delta in the weight's layout), rounded to a dtype if one is given; returns the change."""
    before = weight_of(site).detach().clone()
    after = before + delta
    if round_to is not None:
        after = after.to(round_to).double()
    with torch.no_grad():
        weight_of(site).copy_(after)
    return after - before
