"""Tables in blocks of rows: the values and gradients of whole tables, and nothing for what is frozen."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from medim.errors import UserError
from medim.model.head import RestrictedHead
from medim.model.rows import SplitEmbedding, SplitHead, joined, split_rows

V, D, N = 20, 8, 23
LAYOUTS = pytest.mark.parametrize(
    "trained", [[(12, 20)], [(4, 9)], [(4, 9), (18, 20)], [(0, 20)]], ids=["tail", "middle", "two", "all"]
)
GROUPS = {"start": (0, 12, 2, 0), "stop": (12, 20, 15, 20), "rows": (9, 8, 0, 6)}  # the last two are in several blocks


def parameters(trained: list[tuple[int, int]], weight: Tensor) -> dict[tuple[int, int], nn.Parameter]:
    cuts = sorted({0, V, *(edge for interval in trained for edge in interval)})
    pairs = itertools.pairwise(cuts)
    return {(a, b): nn.Parameter(weight[a:b].detach().clone(), (a, b) in trained) for a, b in pairs}


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_split_head_is_the_whole_one(trained: list[tuple[int, int]], dtype: torch.dtype) -> None:
    whole = RestrictedHead(D, V, dtype=dtype)
    split = SplitHead(parameters(trained, whole.weight))
    assert torch.equal(split.weight, whole.weight) and split.size == V
    targets = torch.cat([
        torch.randint(a, b, (n,)) for a, b, n in zip(GROUPS["start"], GROUPS["stop"], GROUPS["rows"], strict=True)
    ])  # fmt: skip
    data, pull = torch.randn(N, D, dtype=dtype), torch.randn(N, dtype=dtype)
    found: list[Any] = []
    for head in (whole, split):
        hidden = data.clone().requires_grad_()
        nll = head(hidden, targets, GROUPS["start"], GROUPS["stop"], GROUPS["rows"])
        (nll * pull).sum().backward()
        found.append((nll, hidden.grad, head(hidden), head(hidden, start=3, stop=14), head(hidden[None], None)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert whole.weight.grad is not None
    for interval in split.intervals:
        block = split.block(interval)
        if interval in trained:
            torch.testing.assert_close(block.grad, whole.weight.grad[slice(*interval)], atol=1e-6, rtol=1e-5)
        else:
            assert block.grad is None and not block.requires_grad


@LAYOUTS
def test_the_split_embedding_is_the_whole_one(trained: list[tuple[int, int]]) -> None:
    whole = nn.Embedding(V, D)
    split = SplitEmbedding(parameters(trained, whole.weight))
    ids, pull = torch.randint(V, (3, 17)), torch.randn(3, 17, D)
    assert torch.equal(split(ids), whole(ids))
    for one in (whole, split):
        (one(ids) * pull).sum().backward()
    assert whole.weight.grad is not None
    for interval in trained:
        torch.testing.assert_close(split.block(interval).grad, whole.weight.grad[slice(*interval)])
    assert torch.equal(SplitEmbedding(parameters(trained, whole.weight), scale=3.0)(ids), 3 * whole(ids))


def test_a_process_without_rows_takes_part() -> None:
    split = SplitHead(parameters([(12, 20)], torch.randn(V, D)))
    hidden = torch.randn(0, D, requires_grad=True)
    split(hidden, torch.zeros(0, dtype=torch.long), (0, 12), (12, 20), (0, 0)).sum().backward()
    assert torch.equal(split.block((12, 20)).grad, torch.zeros(8, D)) and hidden.grad is not None


def test_wrong_calls_say_what_is_wrong() -> None:
    split, hidden = SplitHead(parameters([(12, 20)], torch.randn(V, D))), torch.randn(2, D)
    with pytest.raises(ValueError, match="give both"):
        split(hidden, start=1)
    with pytest.raises(ValueError, match=r"columns 3\.\.21 of a weight with 20 rows"):
        split(hidden, start=3, stop=21)
    with pytest.raises(ValueError, match="they must sum to 2"):
        split(hidden, torch.zeros(2, dtype=torch.long), (0, 12), (12, 20), (1, 2))
    with pytest.raises(ValueError, match="of one group"):
        split(hidden, start=(0, 12), stop=(12, 20))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_tie_stays_a_tie(tied: bool, device: str) -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        backbone = AutoModelForCausalLM.from_config(config)
    before = copy.deepcopy(backbone)
    split_rows(backbone, [(12, 20)])
    embedding, head = backbone.get_input_embeddings(), backbone.get_output_embeddings()
    assert isinstance(embedding, SplitEmbedding) and isinstance(head, SplitHead)
    for interval in ((0, 12), (12, 20)):
        assert (embedding.block(interval) is head.block(interval)) == tied
        assert embedding.block(interval).device.type == device and embedding.block(interval).is_leaf
    assert sum(p.numel() for p in backbone.parameters()) == sum(p.numel() for p in before.parameters())
    if device == "cpu":
        ids = torch.randint(V, (2, 5))
        torch.testing.assert_close(
            backbone(ids).logits, before(ids).logits, atol=1e-6, rtol=0
        )  # blocks round otherwise


def test_an_embedding_that_does_more_is_refused() -> None:
    class Odd(nn.Embedding):
        pass

    config = AutoConfig.for_model("llama", vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2)
    backbone = AutoModelForCausalLM.from_config(config)
    backbone.set_input_embeddings(Odd(V, D))
    with pytest.raises(UserError, match=r"embeds by Odd, which cannot be split; set lora\.rows=none"):
        split_rows(backbone, [(12, 20)])


def test_intervals_are_joined() -> None:
    assert joined([(9, 10), (3, 7), (7, 8), (12, 13), (10, 11)]) == [(3, 8), (9, 11), (12, 13)]
