"""Optimizers: what each steps, Muon against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from medim.errors import UserError
from medim.model.backbone import BackboneOptions
from medim.model.medim import MeDiMModel, ModelOptions
from medim.training.optimizer import (
    OptimizerOptions,
    make_optimizer,
    muon_matrices,
    newton_schulz_flops,
    orthogonalised,
)
from medim.vocabulary import Vocabulary

SMALL = BackboneOptions(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48
)


@pytest.fixture
def model() -> MeDiMModel:
    torch.manual_seed(0)
    made = MeDiMModel.from_options(ModelOptions(SMALL, adaln_dim=8), Vocabulary.build(7, 0, 5))
    for parameter in made.parameters():
        parameter.grad = torch.randn_like(parameter)
    return made


def changes(model: MeDiMModel, o: OptimizerOptions) -> dict[str, Tensor]:
    """What one step adds to each weight."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_optimizer(model, o).step()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    groups = make_optimizer(model, OptimizerOptions()).param_groups
    assert [p.dim() for p in groups[0]["params"]] == [2] and groups[0]["weight_decay"] > 0
    assert all(p.dim() == 1 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0


def test_muon_takes_the_seven_matrices_of_each_layer(model: MeDiMModel) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    taken = [names[id(p)] for p in muon_matrices(model)]
    assert len(taken) == 14 and all("layers" in name and name.endswith("proj.weight") for name in taken)
    for parameter in model.backbone.model.layers[0].parameters():
        parameter.requires_grad_(False)
    assert len(muon_matrices(model)) == 7


def test_muon_adds_semi_orthogonal_matrices_of_the_size_of_adamws(model: MeDiMModel) -> None:
    """The first update is along U V^T of the gradient U S V^T; its root mean square is 0.2 times the rate where the
    matrix is square (Liu et al. 2025, section 2.2)."""
    o = OptimizerOptions(optimizer="muon", lr=1e-3, muon_lr=4e-3, weight_decay=0.0)
    bases = {}
    taken = {id(p) for p in muon_matrices(model)}
    for name, p in model.named_parameters():
        if id(p) in taken and p.grad is not None:
            left, values, right = torch.linalg.svd(p.grad, full_matrices=False)
            p.grad, bases[name] = left @ torch.diag(values + values.max() / 5) @ right, left @ right
    for name, change in changes(model, o).items():
        if name not in bases:
            continue
        along = -change / (o.muon_lr * 0.2 * max(change.shape) ** 0.5)
        singular = torch.linalg.svdvals(along)
        assert singular.min() > 0.5 and singular.max() < 1.3, name  # five iterations come so near to 1
        assert torch.sum(along * bases[name]) / (along.norm() * bases[name].norm()) > 0.97, name


def test_where_bf16_is_emulated_muon_multiplies_in_float32(model: MeDiMModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps as torch's Muon takes them in bf16, with momentum and decay; and to float32's precision, the update
    has the singular vectors of the momentum and the values that five iterations of the polynomial make of its own."""
    o = OptimizerOptions(optimizer="muon", lr=1e-3, muon_lr=4e-3, weight_decay=0.1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    taken = {id(p) for p in muon_matrices(model)}
    found: dict[bool, dict[str, Tensor]] = {}
    for bf16 in (True, False):
        monkeypatch.setattr("medim.training.optimizer.multiplies_bf16", lambda bf16=bf16: bf16)
        model.load_state_dict(start)
        torch.manual_seed(1)
        optimizer = make_optimizer(model, o)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        found[bf16] = {n: p.detach() - start[n] for n, p in model.named_parameters() if id(p) in taken}
    for name, change in found[False].items():
        torch_s = found[True][name]
        assert 0 < (change - torch_s).norm() < 0.02 * torch_s.norm(), name

    matrix = torch.randn(7, 4, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    for x, truth in ((matrix, left @ torch.diag(values) @ right), (matrix.T, (left @ torch.diag(values) @ right).T)):
        torch.testing.assert_close(orthogonalised(x, (3.4445, -4.775, 2.0315), 5, 1e-7), truth)


def test_what_muon_does_not_take_is_stepped_by_adamw(model: MeDiMModel) -> None:
    taken = {id(p) for p in muon_matrices(model)}
    mine = {name for name, p in model.named_parameters() if id(p) in taken}
    start = {name: value.clone() for name, value in model.state_dict().items()}
    found = changes(model, OptimizerOptions(optimizer="muon"))
    model.load_state_dict(start)
    for name, change in changes(model, OptimizerOptions()).items():
        assert torch.equal(change, found[name]) == (name not in mine), name


def test_one_state_and_one_list_of_groups(model: MeDiMModel) -> None:
    optimizer = make_optimizer(model, OptimizerOptions(optimizer="muon", lr=1e-3, muon_lr=4e-3))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "a rate was not heard"
    assert [group.get("scale") for group in optimizer.param_groups] == [4.0, None, None]
    assert set(optimizer.state) == set(model.parameters())
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_products_of_orthogonalisation_are_counted(model: MeDiMModel) -> None:
    optimizer = make_optimizer(model, OptimizerOptions(optimizer="muon"))
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == newton_schulz_flops(model) > 0


def test_a_torch_without_muon_is_named(model: MeDiMModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match="older than Muon"):
        make_optimizer(model, OptimizerOptions(optimizer="muon"))
