"""Adapters: the base at the start, gradients where they belong and of the right value, the same model when merged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from medim.canvas import Canvas
from medim.diffusion import predict
from medim.errors import UserError
from medim.model import adapters
from medim.model.lora import (
    PROJECTIONS,
    LoraOptions,
    Plain,
    add_lora,
    check_sharing,
    draw_factor,
    plain_name,
    quantise,
    trained_names,
    trained_rows,
)
from medim.model.medim import MeDiMModel
from medim.objective import Batch, ObjectiveOptions, loss, make_batch
from medim.training.weights import skeleton
from medim.vocabulary import Vocabulary

OPTIONS = LoraOptions(rank=4, alpha=8)
D, MLP, RANK, ADALN = 64, 96, 4, 16
KINDS = pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("qwen3", False)])


@pytest.fixture
def make(tmp_path: Path, vocabulary: Vocabulary) -> Callable[..., MeDiMModel]:
    """Makes a network over a small pretrained language model with 12 rows, AdaLN not zero."""

    def network(kind: str = "llama", tied: bool = False) -> MeDiMModel:
        config = AutoConfig.for_model(
            kind, vocab_size=12, hidden_size=D, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=MLP, max_position_embeddings=128, tie_word_embeddings=tied,
            initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        folder = tmp_path / f"{kind}-{tied}"
        if not folder.exists():
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        torch.manual_seed(1)
        model = MeDiMModel.from_backbone(folder, vocabulary, ADALN)
        for adaln in model.adaln:
            nn.init.normal_(adaln.linear.weight, std=0.1)  # type: ignore[union-attr, arg-type]
        return model.eval()

    return network


@pytest.fixture
def batch(make_rows: Any, vocabulary: Vocabulary) -> Batch:
    """Four noised studies of unequal length."""
    canvas = Canvas.collate(make_rows([8, 3, 5, 6]), 0)
    return make_batch(canvas, range(4), 4, 0, 0, ObjectiveOptions(), vocabulary.mask)


def total(model: MeDiMModel, batch: Batch) -> Tensor:
    return loss(model, batch, ObjectiveOptions()).total


def logits(model: MeDiMModel) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(model.vocabulary.size, (3, 13), generator=generator)
    with torch.no_grad():
        return model.head(model(ids, torch.rand(3, 13, generator=generator)))


def train(model: MeDiMModel, batch: Batch, steps: int = 3, lr: float = 0.02) -> torch.optim.Optimizer:
    """A few steps, large enough to be seen."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=0.1)
    for _ in range(steps):
        total(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@KINDS
def test_the_start_is_the_base_and_what_trains_is_known(
    make: Callable[..., MeDiMModel], kind: str, tied: bool, batch: Batch
) -> None:
    model = make(kind, tied)
    before, first = logits(model), total(model, batch)
    expected = trained_names(model, OPTIONS)
    add_lora(model, OPTIONS)
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)
    torch.testing.assert_close(total(model, batch), first, atol=1e-5, rtol=1e-6)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == expected

    def count(*parts: str) -> int:
        return sum(n for name, n in trained.items() if any(part in name for part in parts))

    heads, keys, new = 4 * 16, 2 * 16, model.vocabulary.size - 12
    pairs = [(D, heads), (D, keys), (D, keys), (heads, D), (D, MLP), (D, MLP), (MLP, D)]
    assert count("lora_") == 2 * sum(RANK * (a + b) for a, b in pairs)
    assert count("adaln.") == 2 * (ADALN + 1) * 6 * D and count("time.") == 2 * (ADALN + 1) * ADALN
    assert count("rows_") == new * D * (1 if tied else 2)
    assert sum(trained.values()) == count("lora_", "adaln.", "time.", "rows_")


@KINDS
def test_names_map_to_every_value_of_the_plain_model(make: Callable[..., MeDiMModel], kind: str, tied: bool) -> None:
    plain, model = make(kind, tied), make(kind, tied)
    add_lora(model, OPTIONS)
    covered = {name: torch.zeros(p.shape[:1], dtype=torch.long) for name, p in plain.named_parameters()}
    factors = 0
    for name, parameter in model.named_parameters():
        place = plain_name(name)
        if place is None:
            factors += 1
            continue
        assert torch.equal(plain.get_parameter(place.name)[place.start : place.stop], parameter), name
        covered[place.name][place.start : place.stop] += 1
    assert factors == 2 * 2 * len(PROJECTIONS) and all(bool((one == 1).all()) for one in covered.values())


@KINDS
def test_gradients_are_those_of_the_plain_model(
    make: Callable[..., MeDiMModel], kind: str, tied: bool, batch: Batch
) -> None:
    """Of what trains in full the same; of B, which is zero, alpha / rank (dL/dW) A^T; of A, zero; of the rest, none."""
    plain, model = make(kind, tied), make(kind, tied)
    add_lora(model, OPTIONS)
    total(plain, batch).backward()
    total(model, batch).backward()
    seen = 0
    for name, parameter in model.named_parameters():
        place = plain_name(name)
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif place is not None:
            whole = plain.get_parameter(place.name).grad
            assert whole is not None and parameter.grad is not None
            torch.testing.assert_close(parameter.grad, whole[place.start : place.stop], atol=2e-4, rtol=1e-4)
            seen += bool(parameter.grad.any())
        elif ".lora_A." in name:
            assert parameter.grad is not None and not parameter.grad.any(), name
        else:
            weight = plain.get_parameter(name.replace(".lora_B.default", "")).grad
            assert weight is not None
            a = model.get_parameter(name.replace(".lora_B.", ".lora_A."))
            torch.testing.assert_close(parameter.grad, 2.0 * weight @ a.T, atol=2e-4, rtol=1e-3)
            seen += bool(parameter.grad is not None and parameter.grad.any())
    assert seen >= 2 * len(PROJECTIONS) + 4


@KINDS
def test_what_is_frozen_never_moves_and_merging_changes_nothing(
    make: Callable[..., MeDiMModel], kind: str, tied: bool, batch: Batch, tmp_path: Path
) -> None:
    plain, model = make(kind, tied), make(kind, tied)
    add_lora(model, OPTIONS, base="somewhere")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = logits(model)
    optimizer = train(model, batch)
    trained = trained_names(plain, OPTIONS)
    assert len(optimizer.state) == len(trained)  # none for what is frozen
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    after = logits(model)
    assert float((after - start).abs().max()) > 0.05

    assert model.lora is not None
    adapters.write_settings(tmp_path, model.lora)
    adapters.write_weights(tmp_path, {name: p for name, p in model.named_parameters() if p.requires_grad})
    assert adapters.read_settings(tmp_path) == model.lora
    read = adapters.read_weights(tmp_path)
    assert set(read) == trained and all(torch.equal(value, model.get_parameter(name)) for name, value in read.items())
    merged = make(kind, tied)
    adapters.apply_adapters(merged, tmp_path)
    torch.testing.assert_close(logits(merged), after, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total(merged, batch), total(model, batch), atol=1e-4, rtol=1e-5)
    assert torch.equal(merged.output_weight[:12], plain.output_weight[:12])
    assert (merged.output_weight is merged.get_input_embeddings().weight) == tied


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft asks transformers for it
def test_peft_alone_loads_them_into_the_plain_backbone(
    make: Callable[..., MeDiMModel], batch: Batch, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = make()
    source = tmp_path / "llama-False"
    add_lora(model, OPTIONS, base=str(source))
    train(model, batch)
    assert model.lora is not None
    adapters.write_settings(tmp_path / "a", model.lora)
    adapters.write_weights(tmp_path / "a", {name: p for name, p in model.named_parameters() if p.requires_grad})
    merged = make()
    adapters.apply_adapters(merged, tmp_path / "a")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "a").merge_and_unload()
    names = [name for name, _ in theirs.named_parameters() if "layers" in name]
    assert len(names) == 2 * 9
    for name in names:
        torch.testing.assert_close(merged.get_parameter(f"backbone.{name}"), theirs.get_parameter(name))


@pytest.mark.parametrize("tied", [False, True])
def test_a_skeleton_is_filled_to_the_same_model(make: Callable[..., MeDiMModel], tied: bool) -> None:
    plain, direct = make(tied=tied), make(tied=tied)
    add_lora(direct, OPTIONS, seed=5)
    with skeleton():
        model = MeDiMModel(plain.config)
    add_lora(model, OPTIONS, seed=5)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in direct.named_parameters()
    ]
    born: dict[int, nn.Parameter] = {}  # a tie stays one
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                empty = nn.Parameter(torch.empty_like(value, device="cpu"), value.requires_grad)
                module._parameters[key] = born.setdefault(id(value), empty)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            place = plain_name(name)
            if place is None:
                draw_factor(name, parameter, 5)
            else:
                parameter.copy_(plain.get_parameter(place.name)[place.start : place.stop])
    for (name, one), (_, other) in zip(model.named_parameters(), direct.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    factors = [p for name, p in model.named_parameters() if ".lora_A." in name]
    assert len({float(p.detach().sum()) for p in factors}) == len(factors)  # each its own draw
    bound = 1 / D**0.5  # of nn.Linear
    assert 0.9 * bound < float(factors[0].detach().abs().max()) <= bound


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_adapters_the_same_gradients(
    make: Callable[..., MeDiMModel], batch: Batch, every: int
) -> None:
    model = make()
    add_lora(model, OPTIONS)
    train(model, batch)  # B is not zero
    model.train()
    total(model, batch).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    total(model, batch).backward()
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(after) == set(before) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in after.items():
        torch.testing.assert_close(gradient, before[name], atol=1e-6, rtol=1e-5)
        assert "place" in name or bool(gradient.any()), name


def test_samplers_and_bounds_take_a_model_with_adapters(make: Callable[..., MeDiMModel], batch: Batch) -> None:
    plain, model = make(), make()
    add_lora(model, OPTIONS)
    canvas = batch.canvas
    report = canvas.has_role("report")
    t = torch.where(report, 0.5, 0.0)
    with torch.no_grad():
        for one, other in zip(
            *(predict(m.denoiser(canvas, report), canvas.ids, t, m.denoiser(canvas, report).groups(report), mask_id=20)
              for m in (plain, model)), strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(one, other)


def test_codes_that_the_backbone_knows() -> None:
    """Chameleon's layout: codes among the text's ids, tags behind. Blocks are cut around them, or around tags only."""
    from medim.model.backbone import BackboneOptions
    from medim.model.medim import ModelOptions

    vocabulary = Vocabulary((0, 40), (4, 12), 0, {"mask": 40, "begin_image": 41, "end_image": 2, "report": 42})
    assert trained_rows(vocabulary, "codes") == [(2, 3), (4, 12), (40, 43)]
    assert trained_rows(vocabulary, "tags") == [(2, 3), (40, 43)] and trained_rows(vocabulary, "none") == []
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    plain = MeDiMModel.from_options(ModelOptions(BackboneOptions(**shape, intermediate_size=48), 16), vocabulary)
    for rows, size in (("codes", 12), ("tags", 4), ("none", 0)):
        model = MeDiMModel(plain.config)
        model.load_state_dict(plain.state_dict())
        add_lora(model, LoraOptions(rank=2, rows=rows))  # type: ignore[arg-type]
        torch.testing.assert_close(logits(model), logits(plain), atol=1e-6, rtol=0)
        trained = [p for n, p in model.named_parameters() if p.requires_grad and ("embed" in n or "head" in n)]
        assert sum(len(p) for p in trained) == 2 * size


def test_places_train_too(vocabulary: Vocabulary) -> None:
    from medim.model.backbone import BackboneOptions
    from medim.model.medim import ModelOptions

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    o = ModelOptions(BackboneOptions(**shape, intermediate_size=48), adaln_dim=16, places=6)
    model = MeDiMModel.from_options(o, vocabulary)
    add_lora(model, LoraOptions(rank=2, targets=("q_proj",)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "place.weight" in trained and sum("lora_" in name for name in trained) == 2


def test_mistakes_are_said(make: Callable[..., MeDiMModel], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    for o, words in (
        (LoraOptions(), "lora.rank=0: adapters have a rank of at least 1"),
        (LoraOptions(rank=2, targets=("q_prj",)), "no projection 'q_prj', did you mean \"q_proj\"?"),
        (LoraOptions(rank=2, targets=("xxx",)), "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
        (LoraOptions(rank=2, targets=()), "names none of down_proj"),
    ):
        with pytest.raises(UserError) as error:
            add_lora(model, o)
        assert words in str(error.value) and "\n" not in str(error.value)
    for package, o in (("bitsandbytes", LoraOptions(rank=2, bits=4)), ("peft", LoraOptions(rank=2))):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(UserError, match=f"pip install {package}"):
                add_lora(model, o)
    assert model.lora is None and all(p.requires_grad for p in model.parameters())
    add_lora(model, OPTIONS, base="here")
    with pytest.raises(UserError, match="has adapters over here already; merge them first"):
        add_lora(model, OPTIONS)


def test_what_cannot_be_divided_is_refused() -> None:
    for o in (LoraOptions(), LoraOptions(bits=4), LoraOptions(rank=2)):
        check_sharing(o, "ZeRO-3", whole=False)
    check_sharing(LoraOptions(rank=2, bits=4, frozen="bf16"), "DDP", whole=True)
    with pytest.raises(UserError, match=r"lora\.bits=4 cannot be used with ZeRO-3.*set lora\.bits=0"):
        check_sharing(LoraOptions(rank=2, bits=4), "ZeRO-3", whole=False)
    with pytest.raises(UserError, match=r"lora\.frozen=bf16 cannot be used with FSDP2.*set lora\.frozen=fp32"):
        check_sharing(LoraOptions(rank=2, frozen="bf16"), "FSDP2", whole=False)


def test_frozen_matrices_in_bf16(make: Callable[..., MeDiMModel], batch: Batch) -> None:
    plain, model = make(), make()
    add_lora(model, LoraOptions(rank=4, frozen="bf16"))
    for name, parameter in model.named_parameters():
        small = not parameter.requires_grad and parameter.dim() == 2
        assert parameter.dtype == (torch.bfloat16 if small else torch.float32), name
    found = logits(model)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits(plain), atol=0.05, rtol=0.05)
    wanted = float(total(plain, batch).detach())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = total(model, batch)
        value.backward()
        assert float(value.detach()) == pytest.approx(wanted, rel=0.01)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("bits", "tolerance"), [(4, 0.05), (8, 0.01)])
def test_a_quantised_base_is_close_and_only_adapters_train(
    make: Callable[..., MeDiMModel], batch: Batch, bits: int, tolerance: float
) -> None:
    pytest.importorskip("bitsandbytes")
    plain, model, whole = make(), make(), make()
    add_lora(whole, OPTIONS)
    o = LoraOptions(rank=4, alpha=8, bits=bits)  # type: ignore[arg-type]
    add_lora(model, o)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if ".base_layer." in n}
    assert len(base) == 2 * len(PROJECTIONS) and {p.dtype for p in base.values()} <= {torch.uint8, torch.int8}
    assert sum(p.numel() for p in base.values()) * 8 // bits == sum(
        plain.get_parameter(name.replace(".base_layer", "")).numel() for name in base
    )
    first, wanted = (float(total(one, batch).detach()) for one in (model, plain))
    assert 0 < abs(first - wanted) < tolerance * wanted
    logits(model)  # evaluating in between leaves the weights as they are
    train(model, batch, 10, lr=0.003)
    train(whole, batch, 10, lr=0.003)
    ended, wanted = float(total(model, batch).detach()), float(total(whole, batch).detach())
    assert ended < 0.9 * first and ended == pytest.approx(wanted, rel=tolerance)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in base.items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained_names(plain, o)
    before = model.backbone.state_dict().keys()
    quantise(model, bits)  # once is enough
    assert model.backbone.state_dict().keys() == before


def test_plain_names() -> None:
    assert plain_name("a.lm_head.rows_5_9") == Plain("a.lm_head.weight", 5, 9)
    assert plain_name("a.q_proj.base_layer.bias") == Plain("a.q_proj.bias", 0, None)
    assert plain_name("adaln.0.linear.weight") == Plain("adaln.0.linear.weight")
    assert plain_name("a.q_proj.lora_B.default.weight") is None
