"""Random numbers and values: independent of what stands beside, and with tails that are there."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import chisquare, kstest

from medim.sampling import Plan
from medim.sampling.draw import CHUNK, Uniform, guide, gumbel, invert, keep_probable, observe, row_seeds


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(rows: int = 2000, length: int = 500) -> Uniform:
    return Uniform(row_seeds(seeded(), rows, torch.device("cpu")), torch.ones(rows, length, dtype=torch.bool))


def test_uniform_numbers_are_uniform_and_independent() -> None:
    uniform = numbers()
    first, second = uniform(0), uniform(1)
    for sample in (first, second, first[:, :1], first[:1]):
        assert kstest(sample.flatten().numpy(), "uniform").pvalue > 1e-3
    other = Uniform(uniform.seeds, uniform.where, part=1)(0)
    pairs = ((first, second), (first, other), (first[:-1], first[1:]), (first[:, :-1], first[:, 1:]))
    for a, b in pairs:
        counts = torch.bincount(((a * 10).long() * 10 + (b * 10).long()).flatten(), minlength=100)
        assert chisquare(counts.numpy()).pvalue > 1e-3


def test_uniform_numbers_have_their_tails() -> None:
    """Of 2e7 numbers 200 are below 1e-5, and as many above 1 - 1e-5; float32 has steps of 6e-8 there."""
    u = torch.cat([numbers(10_000, 1000)(call).flatten() for call in (0, 1)])
    for tail in (u, 1 - u):
        assert abs(int((tail < 1e-5).sum()) - 200) < 5 * math.sqrt(200)
        assert len((tail[tail < 1e-5]).unique()) == int((tail < 1e-5).sum())
    assert float(u.min()) > 0 and float(u.max()) < 1


def test_a_row_has_its_numbers_whatever_stands_around_its_positions() -> None:
    uniform = numbers(3, 6)
    where = torch.zeros(3, 12, dtype=torch.bool)
    where[:, [1, 2, 5, 6, 7, 11]] = True
    assert torch.equal(Uniform(uniform.seeds, where)(4)[where].view(3, 6), uniform(4))
    assert torch.equal(Uniform(uniform.seeds[1:2], where[1:2])(4), Uniform(uniform.seeds, where)(4)[1:2])


def test_splitmix_is_that_of_its_authors() -> None:
    """The published first outputs for the seed 1234567: the numbers are built from them."""
    from medim.sampling.draw import _mix, _steps

    seed = torch.tensor([1234567])
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(_mix(seed + _steps(n + 1))) % 2**64 for n in range(3)] == wanted


@pytest.mark.parametrize("rare", [1e-6, 1e-9, 1e-12])
def test_a_rare_value_is_drawn_at_its_rate(rare: float) -> None:
    """Where u must lie for it, by bisection: a stretch of the length of its probability, to within the bound stated."""
    p = torch.full((1, 1000), (1 - rare) / 999)
    p[0, 700] = rare
    share = float(p[0, 700]) / float(p.double().sum())

    def end(wanted: int) -> float:
        """The u above which the value drawn is beyond `wanted`."""
        low, high = 0.0, 1.0
        for _ in range(60):
            u = (low + high) / 2
            low, high = (u, high) if int(invert(p, torch.tensor([u], dtype=torch.float64))) <= wanted else (low, u)
        return high

    assert end(700) - end(699) == pytest.approx(share, abs=1002 * 2**-53)


def test_a_float32_gumbel_would_not_draw_it() -> None:
    """What the page warns of: its noise ends at 16.6, so of a value of 1e-9 against one of almost 1 it draws none."""
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert gumbel(ends).tolist() == pytest.approx([-3.6, 36.7], abs=0.05)
    largest = -math.log(-math.log(1 - 2.0**-24))
    assert largest == pytest.approx(16.6, abs=0.05) and largest - math.log(1e9) < 0


def test_values_of_probability_zero_are_never_drawn() -> None:
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(4, -1)
    u = torch.tensor([2.0**-53, 0.29999, 0.30001, 1 - 2.0**-53], dtype=torch.float64)
    assert invert(p, u).tolist() == [1, 1, 3, 3]
    assert invert(p * 1e-5, u).tolist() == [1, 1, 3, 3]
    assert invert(torch.full((1, 3), torch.nan), u[:1]).item() < 3  # no index out of range on a device


def test_filters_keep_the_most_probable() -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert keep_probable(p, 2, 1.0)[0].tolist() == pytest.approx([0, 0.4, 0, 0.3])
    assert keep_probable(p, 2, 1.0)[1].tolist() == [0.25] * 4  # ties stay
    assert keep_probable(p, None, 0.75)[0].tolist() == pytest.approx([0, 0.4, 0.2, 0.3])
    assert keep_probable(p, None, 0.65)[0].tolist() == pytest.approx([0, 0.4, 0, 0.3])
    assert keep_probable(p, 2, 0.5)[0].tolist() == pytest.approx([0, 0.4, 0, 0])  # 0.4 of the 0.7 that are left
    assert torch.equal(keep_probable(p, 4, 1.0), p)


def test_guidance_leaves_rows_without_scale_as_they_are() -> None:
    a, b = (torch.log_softmax(torch.randn(3, 4, generator=seeded(i)), 1) for i in range(2))
    b[0, 1] = a[0, 2] = -torch.inf
    mixed = guide(a, b, torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(mixed[0], a[0])
    for row, w in ((1, 1.0), (2, 2.0)):
        wanted = a[row].exp() ** (1 + w) / b[row].exp() ** w
        torch.testing.assert_close(mixed[row].exp(), wanted / wanted.sum())
    assert guide(a, b, torch.ones(3))[0].exp().tolist() == pytest.approx([0, 1, 0, 0])  # unheard of without c


def test_large_groups_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    log_p = torch.log_softmax(torch.randn(50, 7, generator=seeded()), 1)
    u, share = numbers(1, 50)(0)[0], torch.rand(50, generator=seeded())
    for plan in (Plan(temperature_end=0.2, top_k=3), Plan("entropy"), Plan("threshold")):
        whole = observe(log_p, u, share, 3, plan)
        monkeypatch.setattr("medim.sampling.draw.CHUNK", 60)
        pieces = observe(log_p, u, share, 3, plan)
        monkeypatch.setattr("medim.sampling.draw.CHUNK", CHUNK)
        for name in whole.__dataclass_fields__:
            assert torch.equal(getattr(whole, name), getattr(pieces, name))
