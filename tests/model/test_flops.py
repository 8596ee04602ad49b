"""FLOPs by formula against those that torch counts while the objective runs forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

from medim.canvas import Canvas
from medim.model import head
from medim.model.backbone import BackboneOptions
from medim.model.flops import CARDS, Costs, Work, peak_of, total
from medim.model.medim import MeDiMModel, ModelOptions
from medim.objective import Batch, ObjectiveOptions, loss, make_batch
from medim.vocabulary import Vocabulary
from tests.fixtures.flops import counted

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def network(vocabulary: Vocabulary, **shape: Any) -> MeDiMModel:
    options = BackboneOptions(**(SHAPE | {"num_key_value_heads": 2} | shape))
    return MeDiMModel.from_options(ModelOptions(backbone=options, adaln_dim=16), vocabulary).train()


def batch_of(rows: Any, vocabulary: Vocabulary, pack: int = 0, o: ObjectiveOptions | None = None) -> Batch:
    canvas = Canvas.pack(rows, 0, pack) if pack else Canvas.collate(rows, 0)
    return make_batch(canvas, range(len(rows)), len(rows), 3, 5, o or ObjectiveOptions(), vocabulary.mask)


def split(model: MeDiMModel, batch: Batch) -> tuple[float, float]:
    """FLOPs that torch counts forward and backward."""
    o = ObjectiveOptions()
    with counted() as counter:
        value = loss(model, batch, o).total
    forward = counter.get_total_flops()
    with counted() as counter:
        value.backward()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_flops_are_those_that_torch_counts(vocabulary: Vocabulary, make_rows: Any, attention: str, every: int) -> None:
    model = network(vocabulary, attn_implementation=attention)
    if every:
        model.recompute_blocks(every)
    for pack in (0, 64):
        batch = batch_of(make_rows([8, 3, 5, 9, 1, 4]), vocabulary, pack)
        work = Work.of(batch.canvas, batch.rows, attention, batch.given)
        parts = Costs.of(model).computed(work)
        forward, backward = split(model, batch)
        assert sum(part.forward for part in parts.values()) == forward
        assert sum(part.backward + part.again for part in parts.values()) == backward
        assert (sum(part.again for part in parts.values()) > 0) == bool(every or attention == "sdpa")


def test_frozen_weights_get_no_gradient(vocabulary: Vocabulary, make_rows: Any) -> None:
    model = network(vocabulary)
    model.backbone.requires_grad_(False)
    batch = batch_of(make_rows([8, 3]), vocabulary)
    parts = Costs.of(model).computed(Work.of(batch.canvas, batch.rows, "sdpa", None))
    assert parts["blocks"].backward == parts["blocks"].forward and parts["head"].backward == parts["head"].forward
    forward, backward = split(model, batch)
    assert total(parts) == forward + backward


def test_a_head_that_cannot_keep_its_softmax_makes_it_again(
    vocabulary: Vocabulary, make_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_BYTES", 64)
    model, batch = network(vocabulary), batch_of(make_rows([8, 3]), vocabulary)
    parts = Costs.of(model).computed(Work.of(batch.canvas, batch.rows, "sdpa", None))
    assert parts["head"].again == parts["head"].forward > 0
    assert total(parts) == sum(split(model, batch))


def test_what_is_needed_does_not_depend_on_padding_and_packing(vocabulary: Vocabulary, make_rows: Any) -> None:
    model, rows = network(vocabulary), make_rows([8, 3, 5, 9, 1, 4])
    costs = Costs.of(model)
    each = []
    for pack in (0, 64):
        batch = batch_of(rows, vocabulary, pack)
        work = Work.of(batch.canvas, batch.rows, "sdpa", batch.given)
        each.append((work, costs.needed(work)))
    (padded, one), (packed, two) = each
    assert padded.attended == packed.attended == sum(len(row.ids) ** 2 for row in rows) < padded.pairs
    assert {k: v for k, v in one.items() if k != "AdaLN"} == {k: v for k, v in two.items() if k != "AdaLN"}
    lone = [costs.needed(_work(batch_of([row], vocabulary))) for row in rows]
    assert sum(parts["blocks"].forward for parts in lone) == pytest.approx(one["blocks"].forward)
    assert all(part.again == 0 for part in one.values())


def _work(batch: Batch) -> Work:
    return Work.of(batch.canvas, batch.rows, "sdpa", batch.given)


def test_given_positions_do_not_attend_to_others(vocabulary: Vocabulary, make_rows: Any) -> None:
    o = ObjectiveOptions(tasks={"report": 1.0}, condition_attention="prefix", condition_dropout=0.0)
    rows = make_rows([8, 3])  # 6 codes with 4 tags around them, then the report
    batch = batch_of(rows, vocabulary, o=o)
    assert batch.given is not None
    by_hand = 0
    for row in rows:
        report = int((row.kind == 0).sum())
        given = len(row.ids) - report
        by_hand += given**2 + report * len(row.ids)
    assert _work(batch).attended == by_hand
    flex = Work.of(batch.canvas, batch.rows, "flex_attention", batch.given)
    assert flex.pairs == by_hand < _work(batch).pairs


def test_six_flops_a_weight_and_position(vocabulary: Vocabulary) -> None:
    """Kaplan et al. 2020 (arXiv 2001.08361): 6 N of all positions, for the linear layers."""
    model = network(vocabulary)
    costs = Costs.of(model)
    weights = sum(p.numel() for layer in model.backbone.model.layers for p in layer.parameters() if p.dim() == 2)
    assert costs.blocks + costs.blocks_backward == 6 * weights


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_cards_are_known_by_the_names_that_they_give_themselves(name: str, card: str) -> None:
    assert peak_of(name) == CARDS[card][0] * 1e12


def test_an_unknown_card_has_no_peak() -> None:
    assert peak_of("Tesla K80") is None
