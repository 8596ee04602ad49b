"""The restricted head: the same values and gradients as all columns would give, in chunks or not."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medim.model import head

N, D, V, START, STOP = 37, 8, 50, 12, 31


@pytest.fixture
def parts() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(N, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=True)
    return hidden, weight, torch.randint(START, STOP, (N,))


@pytest.mark.parametrize("rows_a_chunk", [10_000, 37, 10, 1, 0])
def test_cross_entropy_over_some_columns(
    monkeypatch: pytest.MonkeyPatch, parts: tuple[torch.Tensor, ...], rows_a_chunk: int
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_a_chunk * 4 * (STOP - START))
    hidden, weight, targets = parts
    scale = torch.rand(N)

    excluded = torch.full((V,), -torch.inf)
    excluded[START:STOP] = 0
    wanted = functional.cross_entropy(hidden @ weight.T + excluded, targets, reduction="none")
    (wanted * scale).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None

    found = head.restricted_cross_entropy(hidden, weight, targets, START, STOP)
    torch.testing.assert_close(found, wanted)
    (found * scale).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    torch.testing.assert_close(hidden.grad, gradients[0])
    torch.testing.assert_close(weight.grad, gradients[1])
    outside = torch.cat([weight.grad[:START], weight.grad[STOP:]])
    assert not bool(outside.any()) and bool(weight.grad[START:STOP].any(1).all())


def test_a_chunk_has_no_more_rows_than_fit(monkeypatch: pytest.MonkeyPatch, parts: tuple[torch.Tensor, ...]) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 10 * 4 * (STOP - START))
    sizes: list[int] = []
    real = functional.cross_entropy

    def watched(logits: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        sizes.append(len(logits))
        return real(logits, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(head.F, "cross_entropy", watched)
    head.restricted_cross_entropy(*parts, START, STOP).sum().backward()
    assert sizes[:4] == [10, 10, 10, 7] and sorted(sizes[4:]) == [7, 10, 10, 10]  # again in the backward pass


def test_restricted_logits_are_the_columns(parts: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, _ = parts
    found = head.restricted_logits(hidden, weight, START, STOP)
    torch.testing.assert_close(found, (hidden @ weight.T)[:, START:STOP])
