"""The authors' checkpoints: a tiny one of their structure and names, against their forward pass written out here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from medim.canvas import Canvas
from medim.cli import main
from medim.data.studies import Image, Study
from medim.official import SLOT
from medim.pipeline import MeDiM
from medim.tokenization.image import VQTokenizer
from medim.tokenization.joint import JointTokenizer

D, HEADS, HEAD, MLP, LAYERS, CODES = 32, 4, 8, 48, 3, 16
SIDE = 6  # codes
EPS = 1e-3


def llama_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """<unk>, <s>, </s>, then letters and a few words, with Llama's marks of space and its <s> before every text."""
    letters = [chr(c) for c in range(32, 127)]
    words = ["▁Image", "▁Size:", "▁heart", "▁is", "▁normal"]
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "▁", *letters, *words])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    made.save_pretrained(str(folder))
    return made


def random_state(rows: int, frequencies: int = 256) -> dict[str, Tensor]:
    """A checkpoint as accelerate writes the authors' network, which shares its embedding with its head."""

    def draw(*shape: int, scale: float = 0.2) -> Tensor:
        return torch.randn(*shape) * scale

    state = {
        "model.time_embedder.mlp.0.weight": draw(D, frequencies, scale=0.05),
        "model.time_embedder.mlp.0.bias": draw(D),
        "model.time_embedder.mlp.2.weight": draw(D, D),
        "model.time_embedder.mlp.2.bias": draw(D),
        "model.embed_tokens.weight": draw(rows, D),
        "model.norm.weight": draw(D),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (HEADS * HEAD, D), "self_attn.k_proj": (HEADS * HEAD, D),
            "self_attn.v_proj": (HEADS * HEAD, D), "self_attn.o_proj": (D, HEADS * HEAD),
            "mlp.gate_proj": (MLP, D), "mlp.up_proj": (MLP, D), "mlp.down_proj": (D, MLP),
        }.items():  # fmt: skip
            state[f"{at}{name}.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{name}.weight"] = draw(D)
        state[f"{at}adaLN_modulation.weight"] = draw(6 * D, D)
        state[f"{at}adaLN_modulation.bias"] = draw(6 * D)
    return state


def their_forward(state: dict[str, Tensor], ids: Tensor, t: Tensor, text_from: int) -> Tensor:
    """Logits [B, L, V] of the authors' network before any choice of columns, unshifted. ids [B, L], t [B]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + state[f"{name}.weight"])

    sigma = -torch.log1p(-(1 - EPS) * t)
    steps = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
    wave = torch.cat([torch.cos(sigma[:, None] * steps), torch.sin(sigma[:, None] * steps)], 1)
    at = "model.time_embedder.mlp."
    hidden = functional.silu(functional.linear(wave, state[f"{at}0.weight"], state[f"{at}0.bias"]))
    time = functional.linear(hidden, state[f"{at}2.weight"], state[f"{at}2.bias"])

    seen = torch.ones(ids.shape, dtype=torch.bool)  # the mask of the text is its own ids: 0 is not seen
    seen[:, text_from : text_from + SLOT + 1] = ids[:, text_from : text_from + SLOT + 1] != 0
    bias = torch.zeros(ids.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None, None]
    angles = torch.arange(ids.shape[1])[:, None] / 10_000 ** (torch.arange(0, HEAD, 2) / HEAD)
    cos, sin = (torch.cat([f(angles)] * 2, 1) for f in (torch.cos, torch.sin))

    def rotate(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1) * sin

    x = state["model.embed_tokens.weight"][ids] * D**0.5
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        six = functional.linear(time, state[f"{at}adaLN_modulation.weight"], state[f"{at}adaLN_modulation.bias"])
        shift1, scale1, gate1, shift2, scale2, gate2 = six[:, None].chunk(6, -1)
        inner = norm(x, f"{at}input_layernorm") * (1 + scale1) + shift1
        q, k, v = (
            functional.linear(inner, state[f"{at}self_attn.{n}_proj.weight"])
            .unflatten(-1, (HEADS, HEAD))
            .transpose(1, 2)
            for n in "qkv"
        )
        weights = (rotate(q) @ rotate(k).transpose(-1, -2) / HEAD**0.5 + bias).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        x = x + gate1 * functional.linear(mixed, state[f"{at}self_attn.o_proj.weight"])
        inner = norm(x, f"{at}post_attention_layernorm") * (1 + scale2) + shift2
        up, gate = (functional.linear(inner, state[f"{at}mlp.{n}_proj.weight"]) for n in ("up", "gate"))
        gate = functional.gelu(gate, approximate="tanh")
        x = x + gate2 * functional.linear(gate * up, state[f"{at}mlp.down_proj.weight"])
    return norm(x, "model.norm") @ state.get("lm_head.weight", state["model.embed_tokens.weight"]).T


@pytest.fixture(scope="module")
def official(tiny_joint: JointTokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Paths of a tiny checkpoint and its tokenizers, and its state."""
    root = tmp_path_factory.mktemp("official")
    tokenizer = llama_tokenizer(root / "llama")
    tiny_joint.image.save_pretrained(root / "vq")
    torch.manual_seed(4)
    state = random_state(len(tokenizer) + 4 + CODES)
    (root / "ckpt").mkdir()
    save_file(state, root / "ckpt" / "model.safetensors", {"format": "pt"})
    (root / "config.json").write_text(json.dumps({"head_dim": HEAD, "model_type": "gemma"}))
    return {"root": root, "state": state, "words": len(tokenizer)}


def arguments(root: Path, out: Path, checkpoint: str = "ckpt") -> list[str]:
    return [
        "import", "medim-official", str(root / checkpoint), "--vqgan", str(root / "vq"), "--text-tokenizer",
        str(root / "llama"), "--backbone-config", str(root / "config.json"), "--size", "600x500", "--out", str(out),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def imported(official: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "model"
    assert main(arguments(official["root"], out)) == 0
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_authors(official: dict[str, Any], imported: Path, tmp_path: Path, tied: bool) -> None:
    root, state, words = official["root"], dict(official["state"]), official["words"]
    if not tied:
        state["lm_head.weight"] = torch.randn_like(state["model.embed_tokens.weight"]) * 0.2
        (root / "untied").mkdir()
        save_file(state, root / "untied" / "model.safetensors", {"format": "pt"})
        imported = tmp_path / "untied"
        assert main(arguments(root, imported, "untied")) == 0
    model = MeDiM.from_pretrained(imported)
    picture = torch.randint(0, 255, (96, 96), dtype=torch.uint8).numpy()
    import PIL.Image

    study = Study("a", "a", (Image("xray", PIL.Image.fromarray(picture)),), "heart is normal")
    row = model.joint.encode(study)

    # their canvas, put together as they do: <boi> codes <eoi> <s>Image Size ... <s>text, filled with 0 <eos>
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    start = tokenizer.bos_token_id
    said = [start, *tokenizer.encode("Image Size: Width is 600 Height is 500.", add_special_tokens=False)]
    text = [start, *tokenizer.encode("heart is normal", add_special_tokens=False)]
    codes = (model.joint.image_codes(study.images[0]).flatten() + words + 4).tolist()
    text_from = 2 + len(codes) + len(said)
    theirs = [words, *codes, words + 1, *said, *(text + [0] * 256)[:256], words + 2]
    assert row.ids.tolist() == theirs

    mask, clean = words + 3, torch.tensor([theirs, theirs])
    ids = clean.clone()
    ids[0, 1 : 1 + len(codes) : 2] = mask
    ids[:, text_from + 2 : text_from + 9] = mask
    ids[1, 1 : 1 + len(codes)] = mask
    t = torch.tensor([0.3, 0.9])
    every = their_forward(state, ids, t, text_from)
    wanted = {  # as they cut them: text one early, codes one late
        "text": every[:, text_from : text_from + SLOT], "image": every[:, 2 : 2 + len(codes)],
    }  # fmt: skip

    canvas = Canvas.collate([row, row], 0)
    denoiser = model.model.denoiser(canvas, canvas.segment >= 0)
    levels = torch.where(canvas.segment >= 0, t[:, None], 0.0)  # what stands between segments is given
    with torch.no_grad():
        full = denoiser(ids, levels)
        for number, kind in enumerate(("text", "image")):
            at = canvas.kind == number
            start_, stop = model.joint.vocabulary.columns(kind)  # type: ignore[arg-type]
            found = full[at].view(2, -1, full.shape[-1])[..., start_:stop]
            torch.testing.assert_close(found, wanted[kind][..., start_:stop], atol=1e-5, rtol=1e-5)
            (part,) = denoiser.restricted(ids, levels, denoiser.groups(at))
            torch.testing.assert_close(part.view_as(found), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", ["pair", "report", "image"])
def test_it_samples(imported: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    import PIL.Image

    PIL.Image.new("L", (96, 96), 90).save(tmp_path / "a.png")
    given = {"report": ["--image", str(tmp_path / "a.png")], "image": ["--report", "heart is normal"]}.get(task, [])
    out = tmp_path / "out"
    asked = [
        "sample",
        str(imported),
        "--task",
        task,
        "--steps",
        "4",
        "-n",
        "1",
        "--domain",
        "xray",
        "--out",
        str(out),
        *given,
    ]
    assert main(asked) == 0, capsys.readouterr().err
    (line,) = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    assert line["task"] == task and (out / "images").is_dir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.time_embedder.mlp.0.weight"), "time_embedder.mlp.0.weight is missing"),
        (lambda s: s.update({"model.extra": torch.zeros(1)}), "backbone.model.extra is unknown"),
        (lambda s: s.update({"model.embed_tokens.weight": torch.zeros(90, D)}), "has 90 rows; 107 text tokens"),
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), "layers.1.mlp.up_proj.weight is missing"),
    ],
)
def test_another_structure_is_refused(
    official: dict[str, Any], tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(official["state"])
    change(state)
    save_file(state, official["root"] / "other.safetensors")
    assert main(arguments(official["root"], tmp_path / "out", "other.safetensors")) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_file_cut_short(official: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (official["root"] / "ckpt" / "model.safetensors").read_bytes()
    (official["root"] / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    assert main(arguments(official["root"], tmp_path / "out", "short.safetensors")) == 2
    assert "damaged or cut short" in capsys.readouterr().err


def test_a_pickle_gives_tensors_only(official: dict[str, Any], imported: Path, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in official["state"].items()}
    torch.save({"state_dict": state}, official["root"] / "model.ckpt")
    assert main(arguments(official["root"], tmp_path / "out", "model.ckpt")) == 0
    one, other = (MeDiM.from_pretrained(folder).model.state_dict() for folder in (imported, tmp_path / "out"))
    assert all(torch.equal(other[name], value) for name, value in one.items())


def test_pickled_weights_of_a_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    (tmp_path / "bin").mkdir()
    config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert main(["init", str(tmp_path / "bin"), "--image-tokenizer", "demo", "--out", str(tmp_path / "a")]) == 2
    assert "pytorch_model.bin is a pickle, which is not loaded here" in capsys.readouterr().err
    assert main(["import", "weights", str(tmp_path / "bin"), "--out", str(tmp_path / "safe")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "safe", use_safetensors=True).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_a_vqgan_becomes_a_folder(
    tmp_path: Path, tiny_joint: JointTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tiny_joint.image
    c = image.config
    state = {name: value for name, value in image.state_dict().items()}
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(1)}}, tmp_path / "vqgan.ckpt")
    assert main(["import", "vqgan", str(tmp_path / "vqgan.ckpt"), "--out", str(tmp_path / "a")]) == 2
    assert "--config: give the yaml" in capsys.readouterr().err
    plain = VQTokenizer(type(c)(**{**c.__dict__, "patch": 1})).eval()
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "vqgan.ckpt")
    ddconfig = {
        "double_z": False, "z_channels": c.z_channels, "resolution": c.resolution, "in_channels": 3, "out_ch": 3,
        "ch": c.ch, "ch_mult": list(c.ch_mult), "num_res_blocks": c.num_res_blocks, "attn_resolutions": [],
    }  # fmt: skip
    params = {"embed_dim": c.embed_dim, "n_embed": c.n_embed, "ddconfig": ddconfig}
    (tmp_path / "vqgan.yaml").write_text(json.dumps({"model": {"params": params}}))
    asked = [str(tmp_path / "vqgan.ckpt"), "--config", str(tmp_path / "vqgan.yaml"), "--out", str(tmp_path / "vq")]
    assert main(["import", "vqgan", *asked]) == 0
    again = VQTokenizer.from_pretrained(tmp_path / "vq").state_dict()
    assert all(torch.equal(again[name], value) for name, value in plain.state_dict().items())
