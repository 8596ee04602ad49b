"""`medim tokenizer check`: the shipped tokenizer, and a checkpoint as taming's users save it."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from torch import nn

from medim.cli import main
from medim.tokenization.image import VQTokenizer, image_to_tensor, prepare_image

PARAMS: dict[str, Any] = {
    "embed_dim": 8,
    "n_embed": 48,
    "ddconfig": {
        "double_z": False,
        "z_channels": 16,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [16],
        "dropout": 0.0,
    },
    "lossconfig": {"target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"},
}


class VQModel(nn.Module):
    """taming's `VQModel` of its published submodules, under its names; the original needs pytorch-lightning."""

    def __init__(self) -> None:
        super().__init__()
        from taming.modules.diffusionmodules.model import Decoder, Encoder
        from taming.modules.discriminator.model import NLayerDiscriminator
        from taming.modules.vqvae.quantize import VectorQuantizer2 as VectorQuantizer

        ddconfig, width = PARAMS["ddconfig"], PARAMS["embed_dim"]
        self.encoder = Encoder(**ddconfig)
        with contextlib.redirect_stdout(io.StringIO()):
            self.decoder = Decoder(**ddconfig)
        self.loss = nn.Module()
        self.loss.discriminator = NLayerDiscriminator(ndf=8, n_layers=1)
        self.quantize = VectorQuantizer(PARAMS["n_embed"], width, beta=0.25)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], width, 1)
        self.post_quant_conv = nn.Conv2d(width, ddconfig["z_channels"], 1)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(codes, reconstruction) as taming's encode and decode."""
        quantized, _, (_, _, codes) = self.quantize(self.quant_conv(self.encoder(pixels)))
        return codes, self.decoder(self.post_quant_conv(quantized))


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[VQModel, list[str]]:
    """A model with random weights, and the arguments that name its .ckpt and .yaml, in a folder with a space."""
    folder = tmp_path / "ein Ordner"
    folder.mkdir()
    model = VQModel().eval()
    with torch.no_grad():  # taming starts the codebook within 1/K of zero: spread it, or every position gets one code
        model.quantize.embedding.weight.normal_(std=0.3)
    module = types.ModuleType("lightning_of_someone")
    exec("class ModelCheckpoint:\n    pass", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = {
        "epoch": 11,
        "global_step": 4000,
        "callbacks": {module.ModelCheckpoint: {"best": module.ModelCheckpoint()}},
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "state_dict": model.state_dict(),
    }
    torch.save(content, folder / "last.ckpt")
    (folder / "project.yaml").write_text(yaml.safe_dump({"model": {"base_learning_rate": 4.5e-6, "params": PARAMS}}))
    return model, [str(folder / "last.ckpt"), "--config", str(folder / "project.yaml")]


def test_a_published_checkpoint_gives_equal_codes_and_pixels(
    published: tuple[VQModel, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, arguments = published
    assert any(name.startswith("loss.") for name in model.state_dict())
    picture = tmp_path / "a picture.png"
    PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).save(picture)
    out, kept = tmp_path / "out", tmp_path / "kept"
    command = ["tokenizer", "check", *arguments, "--image", str(picture), "--out", str(out), "--save", str(kept)]
    assert main([*command, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "K 48, f 2, 32 px, 16x16 codes of width 8" in said

    ours = VQTokenizer.from_pretrained(kept)
    pixels = image_to_tensor(prepare_image(picture, 32))[None]
    with torch.no_grad():
        codes, again = model(pixels)
    assert len(codes.unique()) > 8, "a round trip of one code would say nothing"
    assert torch.equal(ours.encode(pixels).flatten(), codes.flatten())
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels)[0], again, rtol=0, atol=1e-6)
    # from codes, without z + (e - z), whose rounding a decoder with random weights blows up
    torch.testing.assert_close(ours.codes_to_pixels(codes.view(1, 16, 16)), again.clamp(-1, 1), rtol=0, atol=1e-5)

    # the figures it prints, from taming's own pixels
    real = np.asarray(prepare_image(picture, 32), dtype=float)
    made = np.round((again[0].clamp(-1, 1).permute(1, 2, 0).numpy() + 1) * 127.5)
    wanted = 10 * np.log10(255**2 / np.square(real - made).mean())
    figures = re.search(r"images +n 1: PSNR ([\d.]+) dB, SSIM [-\d.]+, (\d+) codes used", said)
    assert figures is not None, said
    assert float(figures[1]) == pytest.approx(wanted, abs=0.02) and int(figures[2]) == len(codes.unique())
    with PIL.Image.open(out / "round_trip.png") as sheet:
        assert sheet.size == (2 * 34 + 2, 34 + 2)
        np.testing.assert_array_equal(np.asarray(sheet)[2:34, 2:34], real)


def test_a_folder_and_the_checkpoint_it_came_from_have_one_hash(
    published: tuple[VQModel, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenizer", "check", *published[1], "--save", str(tmp_path / "kept")]) == 0
    first = capsys.readouterr().out
    assert main(["tokenizer", "check", str(tmp_path / "kept")]) == 0
    second = capsys.readouterr().out
    hashes = [re.findall(r"hash ([0-9a-f]{16})", said) for said in (first, second)]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 1
    assert [line for line in first.splitlines() if "PSNR" in line] == [
        line for line in second.splitlines() if "PSNR" in line
    ]


def test_the_shipped_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "check", "demo"]) == 0
    said = capsys.readouterr().out
    assert "128 px, 16x16 codes" in said
    xray = re.search(r"xray +n 8: PSNR ([\d.]+) dB", said)
    assert xray is not None and float(xray[1]) > 33


def test_mistakes_are_one_line(
    published: tuple[VQModel, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, _, config = published[1]
    (tmp_path / "torn.ckpt").write_bytes(Path(ckpt).read_bytes()[:999])
    for arguments, said in (
        (["check", ckpt], "needs the yaml that came with it"),
        (["check", "demo", "--config", config], "leave it out"),
        (["check", str(tmp_path / "none")], "no such folder or file"),
        (["check", str(tmp_path)], "config.json is missing"),
        (["check", str(tmp_path / "torn.ckpt"), "--config", config], "cannot be read as a torch checkpoint"),
        (["check", "demo", "--image", str(tmp_path / "none.png")], "none.png does not exist"),
        (["chek"], "medim tokenizer chek: unknown; one of check"),
    ):
        assert main(["tokenizer", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error and "\n" not in error, error


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "medim tokenizer  check an image tokenizer" in capsys.readouterr().out
    assert main(["tokenizer"]) == 0
    assert "medim tokenizer check" in capsys.readouterr().out
