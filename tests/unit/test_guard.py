"""Protected directions: against the definition, and what they leave alone."""

import pytest
import torch
from tiny import relative_difference
from torch import nn

from stableedit_pl.method.guard import guard_bytes, guard_of
from stableedit_pl.method.ridge import ridge_update
from stableedit_pl.model.encoding import IGNORED, Encoding
from stableedit_pl.model.micro_batches import Batching
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.sites import resolve_sites
from stableedit_pl.model.text_keys import guards_of_text


def problem(n: int = 7, text: int = 40, d_in: int = 12, d_out: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n + text)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    return draw(n, d_in) + 0.5, draw(n, d_out), draw(text, d_in) * torch.linspace(0.1, 3, d_in)


@pytest.mark.parametrize("n", [7, 20])
@pytest.mark.parametrize("text", [40, 6])
def test_the_update_is_least_squares_with_the_texts_keys_beside_the_turns(n: int, text: int) -> None:
    """``gelsd`` on the turn's rows, the text's rows at their weight with zero targets, and the ridge's."""
    keys, values, x = problem(n, text)
    ridge, weight = 0.7, 0.3
    rows = torch.cat([keys, (weight * n / text) ** 0.5 * x, ridge**0.5 * torch.eye(12)]).double()
    wanted = torch.cat([values, torch.zeros(text + 12, 5)]).double()
    expected = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    update, failed = ridge_update(keys, values, ridge, guard_of(x, 12, weight))
    assert int(failed) == 0 and len(update.left) == n
    assert relative_difference(update.dense(), expected) < 1e-5
    other, _ = ridge_update(keys, values, ridge, guard_of(x, 12, 2 * weight))
    assert relative_difference(other.dense(), expected) > 1e-2


def test_few_directions_hold_the_largest_and_more_weight_changes_text_less() -> None:
    keys, values, x = problem()
    full = guard_of(x, 12, 0.3)
    few = guard_of(x, 3, 0.3)
    assert few.directions.shape == (3, 12) and torch.equal(few.directions, full.directions[:3])
    assert full.energies.tolist() == sorted(full.energies.tolist(), reverse=True)
    assert torch.allclose(few.directions @ few.directions.T, torch.eye(3), atol=1e-6)
    assert few.directions.nbytes + few.energies.nbytes == guard_bytes(12, 3)
    changes = []
    for guard in (None, few, full, guard_of(x, 12, 30.0)):
        update, _ = ridge_update(keys, values, 0.01, guard)
        changes.append(update.at(x).norm().item())
    assert changes == sorted(changes, reverse=True) and changes[-1] < 0.2 * changes[0]


def test_a_texts_keys_are_those_of_every_token_but_the_first(tiny_model: nn.Module) -> None:
    name = "model.layers.1.mlp.down_proj"
    sites = resolve_sites(tiny_model, [name])
    texts = [Encoding((1, 5, 6, 7), (IGNORED,) * 3 + (8,), 4), Encoding((1, 9, 10), (IGNORED,) * 2 + (11,), 3)]
    seen: list[torch.Tensor] = []
    handle = sites[0].module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, 1:]))
    with torch.no_grad():
        for text in texts:
            tiny_model(input_ids=torch.tensor([text.input_ids]))
    handle.remove()
    expected = guard_of(torch.cat(seen), 4, 0.1)
    for tokens in (1000, 8):
        found = guards_of_text(
            PartialForward.tried(tiny_model, sites), sites, texts, Batching(tokens, None), 0, 4, 0.1, 1000
        )[name]
        assert relative_difference(found.energies, expected.energies) < 1e-5
        ours, theirs = (g.directions.T @ g.directions for g in (found, expected))
        assert relative_difference(ours, theirs) < 1e-4
    fewer = guards_of_text(PartialForward(tiny_model), sites, texts, Batching(100, None), 0, 4, 0.1, 2)[name]
    assert relative_difference(fewer.energies[:3], guard_of(seen[0], 4, 0.1).energies[:3]) < 1e-5


@pytest.fixture
def tiny_model() -> nn.Module:
    from tiny import tiny_llama

    return tiny_llama()
