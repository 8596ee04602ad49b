"""The image tokenizer: taming's names, shapes, exact folders, checkpoints read without running their code, pictures."""

from __future__ import annotations

import json
import pickle
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from medim.errors import UserError
from medim.tokenization.image import VQConfig, VQTokenizer, image_to_tensor, prepare_image

SMALL = VQConfig(resolution=32, ch_mult=(1, 1), z_channels=8, embed_dim=4, n_embed=64)


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    made = VQTokenizer(SMALL).eval()
    with torch.no_grad():  # taming starts the codebook within 1/K of zero: spread it, or every position gets one code
        made.quantize.embedding.weight.normal_(std=0.3)
    return made


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).convert(mode)


def block(prefix: str, shortcut: bool = False) -> set[str]:
    layers = ["norm1", "conv1", "norm2", "conv2"] + ["nin_shortcut"] * shortcut
    return {f"{prefix}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_state_dict_names_are_tamings() -> None:
    """As printed by taming's own VQModel for two levels, the second twice as wide, one block a level, loss dropped."""
    expected = {"quantize.embedding.weight"}
    single = ["quant_conv", "post_quant_conv"]
    for half in ("encoder", "decoder"):
        single += [f"{half}.{name}" for name in ("conv_in", "conv_out", "norm_out")]
        single += [f"{half}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")]
        expected |= block(f"{half}.mid.block_1") | block(f"{half}.mid.block_2")
    single += ["encoder.down.0.downsample.conv", "decoder.up.1.upsample.conv"]
    expected |= block("encoder.down.0.block.0") | block("encoder.down.1.block.0", shortcut=True)
    expected |= block("decoder.up.1.block.0") | block("decoder.up.1.block.1")
    expected |= block("decoder.up.0.block.0", shortcut=True) | block("decoder.up.0.block.1")
    expected |= {f"{name}.{kind}" for name in single for kind in ("weight", "bias")}
    assert set(VQTokenizer(replace(SMALL, ch_mult=(1, 2))).state_dict()) == expected


def test_encode_and_decode_shapes(tokenizer: VQTokenizer) -> None:
    assert (tokenizer.codebook_size, tokenizer.downsampling, tokenizer.grid(32, 64)) == (64, 4, (8, 16))
    one, two = picture(0), picture(1, size=(50, 40))
    codes = tokenizer.encode(one)
    assert codes.shape == (8, 8) and codes.dtype == torch.long
    assert tokenizer.encode([one, two]).shape == (2, 8, 8)
    assert tokenizer.encode(torch.rand(3, 3, 32, 64) * 2 - 1).shape == (3, 8, 16)
    decoded = tokenizer.decode(codes)
    assert isinstance(decoded, PIL.Image.Image) and decoded.size == (32, 32) and decoded.mode == "RGB"
    many = tokenizer.decode(codes[None].repeat(2, 1, 1), gray=True)
    assert isinstance(many, list) and [image.mode for image in many] == ["L", "L"]
    pixels = tokenizer.codes_to_pixels(codes[None])
    assert pixels.shape == (1, 3, 32, 32) and pixels.abs().max() <= 1


def test_codes_are_the_nearest_vectors(tokenizer: VQTokenizer) -> None:
    latent = tokenizer.pixels_to_latent(torch.rand(2, 3, 32, 32) * 2 - 1)
    distances = torch.cdist(latent.permute(0, 2, 3, 1).reshape(-1, 4), tokenizer.quantize.embedding.weight)
    _, _, codes = tokenizer.quantize_latent(latent)
    assert torch.equal(codes.flatten(), distances.argmin(dim=1))
    assert len(codes.unique()) > 4


def test_forward_agrees_with_encode_and_decode_and_trains_the_encoder(tokenizer: VQTokenizer) -> None:
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    again, loss, codes = tokenizer(pixels)
    assert torch.equal(codes, tokenizer.encode(pixels))
    torch.testing.assert_close(again.clamp(-1, 1), tokenizer.codes_to_pixels(codes))
    (gradient,) = torch.autograd.grad(again.sum() + loss, tokenizer.encoder.conv_in.weight)
    assert gradient.abs().sum() > 0


def test_codes_do_not_depend_on_the_batch(tokenizer: VQTokenizer) -> None:
    images = [picture(seed) for seed in range(5)]
    together = tokenizer.encode(images)
    assert torch.equal(together, torch.stack([tokenizer.encode(image) for image in images]))


@pytest.mark.parametrize("bad", [torch.full((8, 8), 64), torch.full((8, 8), -1)])
def test_codes_out_of_range(tokenizer: VQTokenizer, bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"0\.\.63"):
        tokenizer.decode(bad)


def test_pixels_that_do_not_fit_the_grid(tokenizer: VQTokenizer) -> None:
    with pytest.raises(UserError, match="multiples of 4"):
        tokenizer.encode(torch.zeros(1, 3, 30, 32))


def test_folder_round_trip_is_exact(tokenizer: VQTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path, {"seed": 7})
    again = VQTokenizer.from_pretrained(tmp_path)
    assert again.config == tokenizer.config and not again.training
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert json.loads((tmp_path / "manifest.json").read_text())["seed"] == 7
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "manifest.json"}


def flip_last_byte(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def edit_config(folder: Path, **changes: object) -> None:
    (folder / "manifest.json").unlink()
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_last_byte, "model.safetensors is not the file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: edit_config(folder, n_embd=3), "did you mean 'n_embed'"),
        (lambda folder: edit_config(folder, n_embed=65), r"embedding.weight is \[64, 4\]"),
        (lambda folder: edit_config(folder, num_res_blocks=2), "lacks"),
        (lambda folder: edit_config(folder, ch=33), "multiple of 32"),
        (lambda folder: edit_config(folder, fit="stretch"), "fit is 'stretch': one of crop, pad"),
    ],
)
def test_damaged_folders(tokenizer: VQTokenizer, tmp_path: Path, damage: object, message: str) -> None:
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        VQTokenizer.from_pretrained(tmp_path)


def test_another_resolution_is_another_grid_of_the_same_weights(tokenizer: VQTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path / "small")
    larger = VQTokenizer.from_pretrained(tmp_path / "small")
    larger.prepare_at(64)
    larger.save_pretrained(tmp_path / "large")
    again = VQTokenizer.from_pretrained(tmp_path / "large")
    one = picture(0, size=(64, 64))
    assert again.config == replace(SMALL, resolution=64) and again.encode(one).shape == (16, 16)
    assert again.encode(one).equal(tokenizer.encode(image_to_tensor(one)[None])[0])
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in tokenizer.state_dict().items()
    }
    with pytest.raises(UserError, match="resolution 66 is not a multiple of the downsampling 4"):
        larger.prepare_at(66)


def test_attention_stays_at_its_level(tmp_path: Path) -> None:
    """Another resolution is saved so that the folder loads again, with attention after the same blocks."""
    made = VQTokenizer(replace(SMALL, attn_resolutions=(SMALL.resolution // SMALL.downsampling,)))
    made.prepare_at(2 * SMALL.resolution)
    made.save_pretrained(tmp_path)
    again = VQTokenizer.from_pretrained(tmp_path)
    assert again.state_dict().keys() == made.state_dict().keys()
    assert any(".attn.0." in name for name in made.state_dict())


def test_how_pictures_are_fitted_travels_with_the_tokenizer(tokenizer: VQTokenizer, tmp_path: Path) -> None:
    """A config.json that does not say it, as those of before, means crop."""
    wide = picture(5, "L", (64, 32))
    tokenizer.save_pretrained(tmp_path / "crop")
    values = json.loads((tmp_path / "crop" / "config.json").read_text())
    assert values.pop("fit") == "crop"
    (tmp_path / "crop" / "manifest.json").unlink()
    (tmp_path / "crop" / "config.json").write_text(json.dumps(values))
    cropping = VQTokenizer.from_pretrained(tmp_path / "crop")
    assert (
        cropping.config == SMALL and cropping.prepare(wide, True).tobytes() == prepare_image(wide, 32, True).tobytes()
    )
    padding = VQTokenizer(replace(SMALL, fit="pad")).eval()
    padding.load_state_dict(tokenizer.state_dict())
    padding.save_pretrained(tmp_path / "pad")
    padding = VQTokenizer.from_pretrained(tmp_path / "pad")
    assert padding.config.fit == "pad"
    prepared = padding.prepare(wide, gray=True)
    assert not np.asarray(prepared)[:8].any() and not np.asarray(prepared)[24:].any()
    assert padding.encode(wide, gray=True).equal(padding.encode(prepared))
    assert not padding.encode(wide).equal(padding.encode(prepared))  # white border
    assert not padding.encode(prepared).equal(cropping.encode(wide))


# taming checkpoints -----------------------------------------------------------------------------------------


def taming_yaml(path: Path, config: VQConfig) -> Path:
    ddconfig = {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": config.resolution,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.ch,
        "ch_mult": list(config.ch_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"embed_dim": config.embed_dim, "n_embed": config.n_embed, "ddconfig": ddconfig}
    path.write_text(yaml.safe_dump({"model": {"target": "taming.models.vqgan.VQModel", "params": params}}))
    return path


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module whose classes touch a file when they are made, unpickled or given their state."""
    module = types.ModuleType("throwaway_callbacks")
    source = """
import pathlib
class ModelCheckpoint:
    def __init__(self, path):
        self.path = path
    def __setstate__(self, state):
        pathlib.Path(state["path"]).touch()
class Reduced:
    def __init__(self, path):
        self.path = path
    def __reduce__(self):
        return touch, (self.path,)
def touch(path):
    pathlib.Path(path).touch()
"""
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_from_taming_reads_tensors_and_runs_nothing(foreign: types.ModuleType, tmp_path: Path) -> None:
    plain = replace(SMALL, patch=1)
    source = VQTokenizer(plain)
    flag, ckpt = tmp_path / "touched", tmp_path / "last.ckpt"
    torch.save(
        {
            "epoch": 3,
            "callbacks": {foreign.ModelCheckpoint: foreign.ModelCheckpoint(str(flag))},
            "hyper_parameters": foreign.Reduced(str(flag)),
            "state_dict": {**source.state_dict(), "loss.discriminator.weight": torch.zeros(2)},
        },
        ckpt,
    )
    torch.load(ckpt, weights_only=False)
    assert flag.exists(), "the trap must be a real one"
    flag.unlink()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(ckpt, weights_only=True)

    before = torch.serialization.get_safe_globals()
    again = VQTokenizer.from_taming(ckpt, taming_yaml(tmp_path / "model.yaml", plain))
    assert not flag.exists()
    assert again.config == plain
    for name, value in source.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_from_taming_refuses_what_it_cannot_trust(tmp_path: Path) -> None:
    class Shell:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            import os

            return os.system, (f"touch {tmp_path / 'touched'}",)

    torch.save({"state_dict": VQTokenizer(replace(SMALL, patch=1)).state_dict(), "x": Shell()}, tmp_path / "bad.ckpt")
    config = taming_yaml(tmp_path / "model.yaml", SMALL)
    with pytest.raises(UserError, match=re.escape("bad.ckpt cannot be read")):
        VQTokenizer.from_taming(tmp_path / "bad.ckpt", config)
    assert not (tmp_path / "touched").exists()
    with pytest.raises(UserError, match="does not exist"):
        VQTokenizer.from_taming(tmp_path / "none.ckpt", config)


def test_from_taming_is_strict(tmp_path: Path) -> None:
    torch.save({"state_dict": VQTokenizer(replace(SMALL, patch=1)).state_dict()}, tmp_path / "last.ckpt")
    config = taming_yaml(tmp_path / "model.yaml", replace(SMALL, n_embed=128))
    with pytest.raises(UserError, match=r"embedding.weight is \[64, 4\]"):
        VQTokenizer.from_taming(tmp_path / "last.ckpt", config)
    (tmp_path / "model.yaml").write_text("model: {params: {}}")
    with pytest.raises(UserError, match="ddconfig"):
        VQTokenizer.from_taming(tmp_path / "last.ckpt", tmp_path / "model.yaml")


# Pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    values = np.add.outer(np.arange(40), np.arange(60))
    if mode == "I;16":
        image = PIL.Image.fromarray((values * 41).astype(np.uint16))
    elif mode in ("I", "F"):
        image = PIL.Image.fromarray((values * 41).astype(np.int32 if mode == "I" else np.float32))
    else:
        image = PIL.Image.fromarray((values * 2).astype(np.uint8)).convert(mode)
    prepared = prepare_image(image, 32)
    assert prepared.mode == "RGB" and prepared.size == (32, 32)
    gray = np.asarray(prepared.convert("L"), dtype=float)
    assert gray[-8:, -8:].mean() - gray[:8, :8].mean() > 60  # the ramp is still there, 16 bits are not clipped to white


def test_aspect_is_kept_and_the_centre_taken() -> None:
    values = np.zeros((64, 192, 3), dtype=np.uint8)
    values[:, 64:128] = 255
    assert np.asarray(prepare_image(PIL.Image.fromarray(values), 32)).mean() > 250
    exact = picture(3)
    assert np.array_equal(np.asarray(prepare_image(exact, 32)), np.asarray(exact))


def test_gray_has_equal_channels_and_stays_l(tokenizer: VQTokenizer) -> None:
    array = np.asarray(prepare_image(picture(2), 32, gray=True))
    assert np.array_equal(array[..., 0], array[..., 1]) and np.array_equal(array[..., 0], array[..., 2])
    decoded = tokenizer.decode(tokenizer.encode(picture(2, "L")), gray=True)
    assert isinstance(decoded, PIL.Image.Image) and decoded.mode == "L" and decoded.size == (32, 32)


def test_transparency_is_background() -> None:
    clear = PIL.Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    assert prepare_image(clear, 32).getpixel((5, 5)) == (255, 255, 255)
    assert prepare_image(clear, 32, gray=True).getpixel((5, 5)) == (0, 0, 0)


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    picture(0).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:300])
    for name, message in (
        ("a.png", "cannot be read as an image"),
        ("b.png", "cannot be read"),
        ("c.png", "not exist"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_image(tmp_path / name, 32)
    with pytest.raises(UserError, match="shorter side"):
        prepare_image(PIL.Image.new("L", (100, 7)), 32)
    with pytest.raises(UserError, match="one value everywhere"):
        prepare_image(PIL.Image.new("I;16", (32, 32), 5), 32)
