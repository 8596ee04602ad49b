"""The network: no causal mask, padding that moves nothing, AdaLN that starts as the pretrained model, exact folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from medim.canvas import Canvas
from medim.diffusion import predict
from medim.errors import UserError
from medim.model.adaln import AdaLN
from medim.model.backbone import BackboneOptions
from medim.model.medim import MeDiMModel, ModelOptions, PlaceEmbedding
from medim.vocabulary import Vocabulary

TEXT = 24  # rows of the plain language models below


@pytest.fixture
def canvas(make_rows: Any) -> Canvas:
    """Three rows of 6 codes and reports of 8, 3 and 5 ids: the last two are padded."""
    return Canvas.collate(make_rows([8, 3, 5]), 0)


def hidden(model: MeDiMModel, canvas: Canvas, t: Tensor | float) -> Tensor:
    """With a noise level for each position."""
    levels = torch.full(canvas.ids.shape, t) if isinstance(t, float) else t
    each = torch.arange(canvas.ids.shape[1]).expand(canvas.ids.shape)
    with torch.no_grad():
        return model(canvas.ids, levels, each, canvas.valid)


def test_the_last_token_moves_the_first_position(tiny_network: MeDiMModel, canvas: Canvas) -> None:
    before = hidden(tiny_network, canvas, 0.5)
    ids = canvas.ids.clone()
    ids[0, -1] = (ids[0, -1] + 1) % 12
    after = hidden(tiny_network, canvas.with_ids(ids), 0.5)
    assert float((after - before)[0, 0].abs().max()) > 1e-3
    assert torch.equal(after[1:], before[1:])  # and no other row


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_moves_nothing(tiny_network: MeDiMModel, canvas: Canvas, attention: str, make_rows: Any) -> None:
    tiny_network.backbone.set_attn_implementation(attention)
    before = hidden(tiny_network, canvas, 0.5)
    other = canvas.with_ids(torch.where(canvas.valid, canvas.ids, 7))
    assert torch.equal(hidden(tiny_network, other, 0.5)[canvas.valid], before[canvas.valid])
    levels = torch.where(canvas.valid, 0.5, 0.9)
    assert torch.equal(hidden(tiny_network, canvas, levels)[canvas.valid], before[canvas.valid])
    length = canvas.ids.shape[1]
    longer = Canvas.collate(make_rows([8, 3, 5]), 0, length=length + 9)
    torch.testing.assert_close(
        hidden(tiny_network, longer, 0.5)[:, :length][canvas.valid], before[canvas.valid], atol=2e-6, rtol=0
    )
    alone = Canvas.collate(make_rows([8, 3])[1:], 0)
    size = alone.ids.shape[1]
    torch.testing.assert_close(hidden(tiny_network, alone, 0.5)[0], before[1, :size], atol=2e-6, rtol=0)


def plain_model(folder: Path, kind: str, tied: bool) -> Path:
    """A small language model with random weights, as transformers itself saves it."""
    config = AutoConfig.for_model(
        kind, vocab_size=TEXT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=tied, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


KINDS = pytest.mark.parametrize(
    ("kind", "tied"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", False), ("mistral", False)]
)


@KINDS
def test_step_zero_is_the_pretrained_model_without_its_causal_mask(tmp_path: Path, kind: str, tied: bool) -> None:
    folder = plain_model(tmp_path / "plain", kind, tied)
    config = AutoConfig.from_pretrained(folder)
    causal = AutoModelForCausalLM.from_pretrained(folder).eval()
    config.is_causal = False
    free = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    vocabulary = Vocabulary.build(text_size=TEXT, eos=0, codebook_size=8)
    model = MeDiMModel.from_backbone(folder, vocabulary, adaln_dim=16).eval()

    ids, each = torch.randint(TEXT, (2, 11)), torch.arange(11).expand(2, -1)
    with torch.no_grad():
        wanted, masked = free(ids).logits, causal(ids).logits
        assert float((wanted - masked)[:, :-1].abs().max()) > 1e-2
        for t in (torch.zeros(2, 11), torch.ones(2, 11), torch.rand(2, 11)):
            found = model(ids, t, each) @ model.output_weight.T
            torch.testing.assert_close(found[..., :TEXT], wanted, atol=1e-5, rtol=1e-5)
    assert len(model.output_weight) == vocabulary.size == len(model.get_input_embeddings().weight)
    assert (model.output_weight is model.get_input_embeddings().weight) == tied

    model.save_pretrained(tmp_path / "saved")
    again = MeDiMModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(ids, t, each), model(ids, t, each))
    assert (again.output_weight is again.get_input_embeddings().weight) == tied


def test_new_rows_stand_after_those_of_the_backbone(tmp_path: Path) -> None:
    folder = plain_model(tmp_path, "llama", False)
    old = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    vocabulary = Vocabulary.build(text_size=TEXT - 4, eos=0, codebook_size=8, rows=TEXT, views=())
    model = MeDiMModel.from_backbone(folder, vocabulary, adaln_dim=16)
    assert torch.equal(model.get_input_embeddings().weight[:TEXT], old) and vocabulary.image == (TEXT, TEXT + 8)
    with pytest.raises(ValueError, match="rows are never cut"):
        MeDiMModel.from_backbone(folder, Vocabulary.build(text_size=8, eos=0, codebook_size=2, views=()))


def test_the_noise_level_matters_only_once_adaln_has_weights(tiny_network: MeDiMModel, canvas: Canvas) -> None:
    assert float((hidden(tiny_network, canvas, 0.2) - hidden(tiny_network, canvas, 0.8)).abs().max()) > 1e-2
    for adaln in tiny_network.adaln:
        assert isinstance(adaln, AdaLN)
        adaln.reset()
    torch.testing.assert_close(hidden(tiny_network, canvas, 0.2), hidden(tiny_network, canvas, 0.8), atol=1e-6, rtol=0)


def test_a_random_start_multiplies_branches_by_a_gate_drawn_about_zero(
    tiny_network: MeDiMModel, canvas: Canvas
) -> None:
    """MeDiM's: x + gate branch(x), so that a layer passes on nearly what it got; the identity's gate is 1 exactly."""
    for adaln in tiny_network.adaln:
        assert isinstance(adaln, AdaLN)
        adaln.reset("random")
        time = torch.randn(500, 1, adaln.linear.in_features)
        values = [value.detach() for value in adaln.modulation(time, None)]
        wanted = 0.02 * adaln.linear.in_features**0.5
        for value, mean in zip(values, (0, 0, -1, 0, 0, -1), strict=True):
            assert float(value.mean()) == pytest.approx(mean, abs=0.02)
            assert float(value.std()) == pytest.approx(wanted, rel=0.3)
    tiny_network.config.adaln_start = "random"
    tiny_network.apply(tiny_network._init_weights)  # as a run draws them
    for adaln in tiny_network.adaln:
        assert isinstance(adaln, AdaLN)
        assert float(adaln.linear.weight.detach().std()) == pytest.approx(0.02, rel=0.2)


def test_one_positions_level_moves_others(tiny_network: MeDiMModel, canvas: Canvas) -> None:
    levels = torch.full(canvas.ids.shape, 0.5)
    levels[0, 4] = 0.9
    moved = (hidden(tiny_network, canvas, levels) - hidden(tiny_network, canvas, 0.5)).abs().amax(-1)
    assert float(moved[0, 4]) > 1e-3 and float(moved[0, 0]) > 1e-5 and not bool(moved[1:].any())


def test_levels_by_segment_are_levels_by_position(tiny_network: MeDiMModel, canvas: Canvas) -> None:
    t = torch.rand(3, 3)
    level = torch.where(canvas.segment < 0, 2, canvas.segment)
    with torch.no_grad():
        by_segment = tiny_network(canvas.ids, t, level, canvas.valid)
    torch.testing.assert_close(by_segment, hidden(tiny_network, canvas, t.gather(1, level)), atol=1e-6, rtol=0)


def gradients(model: MeDiMModel, canvas: Canvas) -> dict[str, Tensor]:
    model.train()
    levels = torch.linspace(0, 1, canvas.ids.numel()).view(canvas.ids.shape)
    each = torch.arange(canvas.ids.shape[1]).expand(canvas.ids.shape)
    model(canvas.ids, levels, each, canvas.valid)[canvas.valid].pow(3).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(tiny_network: MeDiMModel, canvas: Canvas) -> None:
    twin = copy.deepcopy(tiny_network.state_dict())
    plain = gradients(tiny_network, canvas)
    model = MeDiMModel(tiny_network.config)
    model.load_state_dict(twin)
    model.activation_checkpointing_enable()
    layer = model.backbone.get_decoder().layers[0]
    calls: list[int] = []
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, canvas)
    assert len(calls) == 2  # forward, and again for backward
    assert found.keys() == plain.keys() and "time.mlp.0.weight" in found and "adaln.1.linear.weight" in found
    for name, value in plain.items():
        assert bool(value.any()), name
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_a_saved_model_comes_back_bit_for_bit(tiny_network: MeDiMModel, canvas: Canvas, tmp_path: Path) -> None:
    tiny_network.save_pretrained(tmp_path)
    again = MeDiMModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.vocabulary == tiny_network.vocabulary
    state = again.state_dict()
    for name, value in tiny_network.state_dict().items():
        assert torch.equal(state[name], value), name
    assert torch.equal(hidden(again, canvas, 0.3), hidden(tiny_network, canvas, 0.3))


def test_attention_implementations_agree(tiny_network: MeDiMModel, canvas: Canvas) -> None:
    found = []
    for name in ("sdpa", "eager"):
        tiny_network.backbone.set_attn_implementation(name)
        found.append(hidden(tiny_network, canvas, 0.4)[canvas.valid])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
    assert not torch.equal(found[0], found[1])  # the switch does switch


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "mistral"])
def test_other_classes_from_scratch(kind: str, vocabulary: Vocabulary, canvas: Canvas) -> None:
    shape = BackboneOptions(
        model_type=kind, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=48, extra={"initializer_range": 0.3},
    )  # fmt: skip
    model = MeDiMModel.from_options(ModelOptions(backbone=shape, adaln_dim=16), vocabulary).eval()
    torch.testing.assert_close(hidden(model, canvas, 0.1), hidden(model, canvas, 0.9), atol=1e-6, rtol=0)
    ids = canvas.ids.clone()
    ids[0, -1] = (ids[0, -1] + 1) % 12
    assert float((hidden(model, canvas.with_ids(ids), 0.1) - hidden(model, canvas, 0.1))[0, 0].abs().max()) > 1e-3


def test_the_bound_denoiser_restricts_before_the_product(tiny_network: MeDiMModel, canvas: Canvas) -> None:
    denoiser, vocabulary = tiny_network.denoiser(canvas, canvas.kind >= 0), tiny_network.vocabulary
    generate = (canvas.kind >= 0) & (torch.rand(canvas.ids.shape) < 0.6)
    groups = denoiser.groups(generate)
    assert [(g.start, g.stop) for g in groups] == [vocabulary.text, vocabulary.image]
    covered = torch.cat([g.rows for g in groups]).sort().values
    assert torch.equal(covered, generate.flatten().nonzero().squeeze(1))
    t = torch.rand(canvas.ids.shape)
    with torch.no_grad():
        full, parts = denoiser(canvas.ids, t), denoiser.restricted(canvas.ids, t, groups)
    for group, part in zip(groups, parts, strict=True):
        rows = full.flatten(0, 1)[group.rows]
        torch.testing.assert_close(part, rows[:, group.start : group.stop], atol=1e-5, rtol=0)
        outside = torch.ones(rows.shape[1], dtype=torch.bool)
        outside[group.start : group.stop] = False
        assert bool((rows[:, outside] == -torch.inf).all())
    with torch.no_grad():
        log_p = predict(denoiser, canvas.ids, t, groups, mask_id=vocabulary.mask)
        everything = predict(lambda ids, t: full, canvas.ids, t, groups, mask_id=vocabulary.mask)
    for one, other in zip(log_p, everything, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(denoiser.groups(generate & (canvas.kind == 1))) == 1  # a kind that does not occur is left out


def test_the_bound_denoiser_runs_its_layout_twice_for_guidance(tiny_network: MeDiMModel, canvas: Canvas) -> None:
    denoiser = tiny_network.denoiser(canvas, canvas.kind == 1)
    generate = canvas.kind == 1
    (once,), (twice,) = denoiser.groups(generate), denoiser.groups(torch.cat([generate, generate]))
    assert torch.equal(twice.rows, torch.cat([once.rows, once.rows + canvas.ids.numel()]))
    other = canvas.ids.roll(1, 1)
    t = torch.rand(canvas.ids.shape)
    with torch.no_grad():
        (both,) = denoiser.restricted(torch.cat([canvas.ids, other]), torch.cat([t, t]), [twice])
        (first,), (second,) = (denoiser.restricted(ids, t, [once]) for ids in (canvas.ids, other))
    torch.testing.assert_close(both, torch.cat([first, second]), atol=1e-5, rtol=0)


def test_a_layer_that_is_not_pre_norm_is_refused() -> None:
    layer = torch.nn.TransformerEncoderLayer(8, 1)
    with pytest.raises(UserError, match="no pre-norm decoder layer: it has no input_layernorm"):
        AdaLN(4, 8).attach(layer)


def test_places_are_nothing_at_the_start_and_then_tell_codes_apart(vocabulary: Vocabulary) -> None:
    shape = BackboneOptions(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    model = MeDiMModel.from_options(ModelOptions(backbone=shape, adaln_dim=16, places=6), vocabulary).eval()
    ids, t = torch.full((1, 8), vocabulary.mask), torch.ones(1, 8)
    place = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, t, place=place), model(ids, t))
        assert model.place is not None
        model.place.weight.normal_()
        assert (model(ids, t, place=place) - model(ids, t)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 2}, "num_key_value_heads=4: does not divide 2 heads"),
        ({"hidden_size": 100}, "hidden_size=100: 4 heads have no even width of it each"),
        ({"model_type": "lama"}, 'model_type=lama: unknown to transformers; did you mean "llama"'),
        ({"model_type": "vit5000"}, "model_type=vit5000: unknown to transformers"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(settings: dict[str, Any], message: str, vocabulary: Vocabulary) -> None:
    with pytest.raises(UserError, match=message):
        MeDiMModel.from_options(ModelOptions(backbone=BackboneOptions(**settings)), vocabulary)


@pytest.mark.parametrize("new", [3, 4, 8])
def test_places_of_a_finer_grid_lie_between_the_old_ones(new: int) -> None:
    """A plane over the grid stays that plane between the outermost old places; 0 is kept."""
    old = 4
    y, x = torch.meshgrid(*[(torch.arange(old) + 0.5) / old] * 2, indexing="ij")
    table = torch.cat([torch.tensor([[7.0, 7.0]]), torch.stack([y, x], -1).flatten(0, 1)])
    found = PlaceEmbedding.resized(table, new * new)
    assert found.shape == (new * new + 1, 2) and found[0].tolist() == [7, 7]
    grid, at = found[1:].unflatten(0, (new, new)), (torch.arange(new) + 0.5) / new
    inner = (at > 1 / 8) & (at < 7 / 8)
    assert torch.allclose(grid[..., 0][inner], at[inner, None].expand(-1, new), atol=1e-5)
    assert torch.allclose(grid[..., 1][:, inner], at[inner].expand(new, -1), atol=1e-5)
    if new == old:
        torch.testing.assert_close(found, table)


def test_only_places_of_a_square_are_interpolated(vocabulary: Vocabulary) -> None:
    shape = BackboneOptions(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    model = MeDiMModel.from_options(ModelOptions(backbone=shape, adaln_dim=4, places=9), vocabulary)
    for rows, found in ((10, 10), (5, 10), (8, 8)):
        assert len(model.fitted("place.weight", torch.zeros(rows, 8))) == found
    assert len(model.fitted("other.weight", torch.zeros(5, 8))) == 5


def test_p_rope_leaves_the_slow_dimensions_unrotated(vocabulary: Vocabulary, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    shape = BackboneOptions(hidden_size=32, num_hidden_layers=1, **heads, rotary_fraction=0.5)
    model = MeDiMModel.from_options(ModelOptions(backbone=shape, adaln_dim=16), vocabulary)
    model.save_pretrained(tmp_path)
    for network in (model, MeDiMModel.from_pretrained(tmp_path)):
        frequencies = network.backbone.get_decoder().rotary_emb.inv_freq
        assert (frequencies[:4] > 0).all() and (frequencies[4:] == 0).all()
