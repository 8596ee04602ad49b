"""Every family of backbones through the same mechanism: step 0 is the backbone without its mask, nothing else moves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, ChameleonForConditionalGeneration

from medim.canvas import Canvas, Row, Segment, layout
from medim.errors import UserError
from medim.model.adaln import AdaLN
from medim.model.lora import LoraOptions, add_lora
from medim.model.medim import MeDiMModel
from medim.objective import ObjectiveOptions, loss, make_batch
from medim.start import BackboneStart, StartOptions, start
from medim.tokenization.joint import JointTokenizer

TEXT = Path(__file__).parents[2] / "tokenizers" / "demo-bpe"
ROWS = 600  # of the tables: more than the 512 tokens of the tokenizer
CODES = 16
WINDOW = 8  # shorter than the canvases here

SHAPE: dict[str, Any] = {
    "vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen2, windows": {"use_sliding_window": True, **MIXED},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0, **MIXED},
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8, **MIXED},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "starcoder2": {"sliding_window": WINDOW},
    "chameleon": {"vq_config": {"embed_dim": 8, "num_embeddings": CODES, "resolution": 32, "base_channels": 32,
                                "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 8}},
}  # fmt: skip
every = pytest.mark.parametrize("family", FAMILIES)
PHI_TARGETS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


def own_ids() -> list[int]:
    """The rows that the tiny Chameleon has for codes 0, 1, ...: out of order, as in the real one."""
    return [4 + (5 * code + 3) % CODES for code in range(CODES)]


def names_of_codes() -> dict[str, int]:
    letters = {str(i): chr(ord("A") + i) for i in range(10)}
    return {"IMGIMG" + "".join(letters[d] for d in str(k)) + "Z": i for k, i in enumerate(own_ids())} | {"<image>": 3}


def save_plain(family: str, folder: Path, **more: Any) -> Path:
    """A tiny language model with random weights and its tokenizer, as transformers saves them."""
    kind = family.split(",")[0]
    settings = SHAPE | FAMILIES.get(family, {}) | more
    if kind in ("chameleon", "phi3"):
        settings.pop("head_dim")
    if kind == "chameleon":
        settings |= {"vocabulary_map": names_of_codes()}
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **settings)
    model = (
        ChameleonForConditionalGeneration(config) if kind == "chameleon" else AutoModelForCausalLM.from_config(config)
    )
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TEXT / file, folder)
    return folder


@pytest.fixture(scope="module")
def image_folder(tiny_joint: JointTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers") / "vq"
    tiny_joint.image.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = save_plain(family, tmp_path_factory.mktemp("plain"))
        return made[family]

    return of


@pytest.fixture
def begin(plain: Callable[[str], Path], image_folder: Path) -> Iterator[Callable[..., MeDiMModel]]:
    def of(family: str, moved: bool = False, **settings: Any) -> MeDiMModel:
        model = start(plain(family), image_folder, StartOptions(BackboneStart(adaln_dim=16, **settings))).model.model
        for adaln in model.adaln if moved else ():
            assert isinstance(adaln, AdaLN)
            torch.nn.init.normal_(adaln.linear.weight, std=0.1)
        return model.eval()

    yield of


def rows_of(model: MeDiMModel, reports: tuple[int, ...]) -> list[Row]:
    rng = torch.Generator().manual_seed(0)
    first, found = model.vocabulary.image[0], []
    for length in reports:
        codes = (first + torch.randint(CODES, (6,), generator=rng)).tolist()
        text = torch.randint(20, 500, (length,), generator=rng).tolist()
        found.append(layout([Segment("image", "xray", codes), Segment("report", "text", text)], model.vocabulary))
    return found


def run(model: MeDiMModel, canvas: Canvas) -> Tensor:
    levels = torch.full((len(canvas.ids), canvas.role.shape[1] + 1), 0.4)
    level = torch.where(canvas.segment < 0, canvas.role.shape[1], canvas.segment)
    with torch.no_grad():
        return model(canvas.ids, levels, level, **model.attention(canvas))


@every
def test_step_zero_is_the_backbone_without_its_mask(
    family: str, plain: Callable[[str], Path], begin: Callable[..., MeDiMModel]
) -> None:
    folder = plain(family)
    loader: Any = ChameleonForConditionalGeneration if family == "chameleon" else AutoModelForCausalLM
    how = "eager" if family == "gemma2" else "sdpa"
    config = AutoConfig.from_pretrained(folder)
    causal = loader.from_pretrained(folder, attn_implementation=how).eval()
    config.is_causal = False
    free = loader.from_pretrained(folder, config=config, attn_implementation=how).eval()
    model = begin(family)
    ids = torch.randint(20, 512, (2, 21), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, masked = free(ids).logits, causal(ids).logits
        found = model.head(model(ids, torch.rand(2, 21)))[..., :ROWS]
    text = wanted > -1e30
    text[..., :20] = False  # Chameleon's codes lie there, and are put in order
    assert float((wanted - masked)[:, :-1][text[:, :-1]].abs().max()) > 1e-2
    torch.testing.assert_close(found[text], wanted[text], atol=1e-5, rtol=1e-5)


@every
def test_padding_moves_nothing_and_the_last_token_the_first_position(
    family: str, begin: Callable[..., MeDiMModel]
) -> None:
    model = begin(family, moved=True)
    rows = rows_of(model, (9, 4))
    padded = run(model, Canvas.collate(rows, 0))
    for number, row in enumerate(rows):
        alone = run(model, Canvas.collate([row], 0))
        torch.testing.assert_close(padded[number, : len(row.ids)], alone[0], atol=2e-5, rtol=1e-5)
    longer = run(model, Canvas.collate(rows, 7, length=30))
    torch.testing.assert_close(longer[0, : len(rows[0].ids)], padded[0, : len(rows[0].ids)], atol=2e-5, rtol=1e-5)
    packed = Canvas.pack(rows, 0, 40)
    together = run(model, packed)
    for number, row in enumerate(rows):
        torch.testing.assert_close(
            together[packed.study == number], padded[number, : len(row.ids)], atol=2e-5, rtol=1e-5
        )
    canvas = Canvas.collate(rows[1:], 0)  # within the reach of two layers of windows
    ids = canvas.ids.clone()
    ids[0, -1] += 1
    assert float((run(model, canvas.with_ids(ids)) - run(model, canvas))[0, 0].abs().max()) > 1e-4


@every
def test_checkpointing_changes_no_gradient_and_saving_nothing(
    family: str, begin: Callable[..., MeDiMModel], tmp_path: Path
) -> None:
    model = begin(family, moved=True)
    canvas = Canvas.collate(rows_of(model, (9, 4)), 0)
    model.save_pretrained(tmp_path)
    again = MeDiMModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(again, canvas), run(model, canvas), atol=0, rtol=0)
    assert (again.output_weight is again.get_input_embeddings().weight) == model.backbone.config.tie_word_embeddings

    batch = make_batch(canvas, range(2), 2, 0, 0, ObjectiveOptions(), model.vocabulary.mask)
    gradients = []
    for network in (model, again):
        if network is again:
            network.recompute_blocks()
        loss(network.train(), batch, ObjectiveOptions()).total.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("adaln" in name for name in gradients[0])
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


@every
def test_adapters_start_as_nothing_and_learn(family: str, begin: Callable[..., MeDiMModel]) -> None:
    model = begin(family, moved=True)
    canvas = Canvas.collate(rows_of(model, (9, 4)), 0)
    batch = make_batch(canvas, range(2), 2, 0, 0, ObjectiveOptions(), model.vocabulary.mask)
    before, first = run(model, canvas), loss(model, batch, ObjectiveOptions()).total
    targets = {"phi3": PHI_TARGETS, "starcoder2": ("q_proj", "v_proj", "c_fc", "c_proj")}
    add_lora(model, LoraOptions(rank=2, **({"targets": targets[family]} if family in targets else {})))
    torch.testing.assert_close(run(model, canvas), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss(model, batch, ObjectiveOptions()).total, first, atol=1e-4, rtol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, batch, ObjectiveOptions()).total.backward()
        optimizer.step()
    assert loss(model, batch, ObjectiveOptions()).total.item() < first.item()


@every
def test_attention_backends_agree(family: str, begin: Callable[..., MeDiMModel]) -> None:
    model = begin(family, moved=True)
    canvas = Canvas.collate(rows_of(model, (9, 4)), 0)
    if family == "gemma2":
        assert model.attention_backend == "eager"  # sdpa cannot cap attention logits
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            model.backbone.set_attn_implementation("sdpa")
        return
    found = run(model, canvas)
    model.backbone.set_attn_implementation("eager")
    torch.testing.assert_close(run(model, canvas)[canvas.valid], found[canvas.valid], atol=1e-5, rtol=1e-5)


@every
def test_the_loss_is_that_of_all_logits(family: str, begin: Callable[..., MeDiMModel]) -> None:
    """Softly capped logits, and rows read beside their position, in the restricted head's value and gradient."""
    for logits in ("plain", "shifted"):
        model = begin(family, moved=True, logits=logits)
        canvas = Canvas.collate(rows_of(model, (9, 4)), 0)
        batch = make_batch(canvas, range(2), 2, 0, 0, ObjectiveOptions(), model.vocabulary.mask)
        assert model.config.read == ({"text": -1} if logits == "shifted" else {})
        total = loss(model, batch, ObjectiveOptions()).total
        total.backward()
        found = model.output_weight.grad.clone()
        model.zero_grad()

        tagged = torch.cat([batch.t, torch.zeros(2, 1)], 1)
        level = torch.where(canvas.segment < 0, batch.t.shape[1], canvas.segment)
        hidden = model(batch.canvas.ids, tagged, level, **model.attention(batch.canvas)).flatten(0, 1)
        products, wanted = hidden @ model.output_weight.T, torch.zeros(())
        cap = getattr(model.backbone.config, "final_logit_softcapping", None)
        for kind, rows, targets in zip(("text", "image"), batch.rows, batch.targets, strict=True):
            start_, stop = model.vocabulary.columns(kind)
            z = products[rows - int(kind == "text" and logits == "shifted")][:, start_:stop]
            z = z if cap is None else cap * torch.tanh(z / cap)
            wanted = wanted + torch.nn.functional.cross_entropy(z, targets - start_, reduction="sum")
        wanted.backward()
        torch.testing.assert_close(total, wanted, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found, model.output_weight.grad, atol=1e-4, rtol=1e-4)


def test_chameleon_keeps_its_own_rows_for_codes_in_their_order(
    plain: Callable[[str], Path], begin: Callable[..., MeDiMModel]
) -> None:
    old = ChameleonForConditionalGeneration.from_pretrained(plain("chameleon"))
    assert [old.model.vocabulary_mapping.img2bpe[code] for code in range(CODES)] == own_ids()
    model = begin("chameleon")
    assert model.vocabulary.image == (4, 4 + CODES) and model.vocabulary.mask == ROWS
    for new, table in (
        (model.get_input_embeddings().weight, old.model.embed_tokens.weight),
        (model.output_weight, old.lm_head.weight),
    ):
        assert torch.equal(new[4 : 4 + CODES], table[own_ids()])
        assert torch.equal(new[4 + CODES : ROWS], table[4 + CODES :]) and torch.equal(new[:4], table[:4])


def test_liquid_keeps_its_own_rows_for_codes(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medim.start.LIQUID", (ROWS - CODES, CODES))
    found = start(save_plain("gemma", tmp_path), image_folder, StartOptions(BackboneStart(adaln_dim=16)))
    assert found.model.joint.vocabulary.image == (ROWS - CODES, ROWS) and found.model.joint.vocabulary.mask == ROWS
    old = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight
    assert torch.equal(found.model.model.output_weight[:ROWS], old)
    monkeypatch.setattr("medim.start.LIQUID", (ROWS - 8, 8))
    with pytest.raises(UserError, match=f"has rows for 8 image codes, the image tokenizer has {CODES}"):
        start(tmp_path, image_folder, StartOptions())


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("olmo2", {}, "Olmo2DecoderLayer is no pre-norm decoder layer: it has no input_layernorm"),
        ("phi", {}, "PhiDecoderLayer is no pre-norm decoder layer: it has no post_attention_layernorm"),
        ("glm4", {}, "Glm4DecoderLayer is no pre-norm decoder layer: its norms are"),
        ("granite", {"logits_scaling": 4.0}, "GraniteForCausalLM gives other logits inside MeDiM"),
        ("chameleon", {"swin_norm": True, **FAMILIES["chameleon"]}, "ChameleonSwinDecoderLayer is no pre-norm"),
    ],
)
def test_other_architectures_are_refused_by_name(
    kind: str, more: dict[str, Any], message: str, image_folder: Path, tmp_path: Path
) -> None:
    folder = save_plain(kind, tmp_path, **more)
    with pytest.raises(UserError, match=message):
        start(folder, image_folder, StartOptions())
