"""Pictures to codes and back: a VQ autoencoder built from taming's own modules, and the one way to prepare a picture.

Shape letters: B batch, H W pixels, h w code grid, Z latent channels before `quant_conv`, E codebook width, K codes.

Source: Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (2012.09841), section 3.1;
van den Oord et al., "Neural Discrete Representation Learning" (1711.00937), equations 1 to 3. Attribute names, and so
state-dict names, are those of taming's `VQModel`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import yaml
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from medim.errors import UserError
from medim.pictures import Backdrop, Pixels, name_of, read_picture

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
MANIFEST_NAME = "manifest.json"
Fit = Literal["crop", "pad"]
MIN_SIDE = 8  # pixels: below this a file is an icon or damaged, not a medical image


@dataclass(frozen=True)
class VQConfig:
    """Shape of a `VQTokenizer`; all but `patch` and `fit` have the names of taming's `ddconfig`.

    Attributes:
        resolution: side in pixels to which pictures are prepared.
        ch: channels of the first level; a multiple of 32, since taming normalises in 32 groups.
        ch_mult: channels of each level in units of `ch`; each level after the first halves the side.
        num_res_blocks: residual blocks a level (the decoder has one more).
        attn_resolutions: sides, in pixels after folding, at which attention follows each block.
        z_channels: channels out of the encoder.
        embed_dim: width of a codebook vector (E).
        n_embed: number of codebook vectors (K).
        in_channels: channels of a picture.
        patch: side of the square of pixels folded into channels before the encoder and unfolded after the decoder; 1 is
            taming's, 2 costs a quarter at the first level and halves the grid once more.
        fit: how a picture that is not square is prepared: the centre of it, or all of it with a border.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # as `medim.config.options`

    resolution: int = 96
    ch: int = 32
    ch_mult: tuple[int, ...] = (1, 2, 3)
    num_res_blocks: int = 1
    attn_resolutions: tuple[int, ...] = ()
    z_channels: int = 32
    embed_dim: int = 16
    n_embed: int = 512
    in_channels: int = 3
    patch: int = 2
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        if self.ch % 32:
            raise UserError(f"VQConfig.ch is {self.ch}: taming's GroupNorm needs a multiple of 32")
        if self.resolution % self.downsampling:
            raise UserError(
                f"VQConfig.resolution {self.resolution} is not a multiple of the downsampling {self.downsampling}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels a code stands for, along one side."""
        return int(self.patch * 2 ** (len(self.ch_mult) - 1))


def prepare_image(
    image: PIL.Image.Image | str | Path | Pixels, resolution: int, gray: bool = False, fit: Fit = "crop"
) -> PIL.Image.Image:
    """Any picture as a square RGB one with its aspect kept: the one way for training, sampling and evaluation.

    Files, 16 bits, windows and orientation are `read_picture`'s. A picture that has the size already is not resampled.

    Args:
        image: a PIL image, the path of a picture or of a DICOM file, or pixels that are read when they are needed.
        resolution: side of the result in pixels.
        gray: average the colours into three equal channels; what is transparent is black, otherwise white.
        fit: "crop": the shorter side to `resolution` pixels, then the centre. "pad": the longer side, so the whole
            picture, in the middle of a border that is black if `gray`, else white as the background of a slide.

    Raises:
        UserError: not a picture, unreadable, shorter side under 8 pixels, or a constant 16-bit picture.
    """
    if isinstance(image, str):
        image = Path(image)
    backdrop: Backdrop = "black" if gray else "white"
    picture = read_picture(image, backdrop).image
    if min(picture.size) < MIN_SIDE:
        size = f"{picture.width}x{picture.height}"
        raise UserError(f"{name_of(image)} is {size} pixels: the shorter side must have {MIN_SIDE} or more")
    flat = (picture.convert("L") if gray else picture).convert("RGB")
    if fit == "crop":
        return PIL.ImageOps.fit(flat, (resolution, resolution), method=PIL.Image.Resampling.BICUBIC)
    (width, x), (height, y) = (padded(length, max(flat.size), resolution) for length in flat.size)
    whole = PIL.Image.new("RGB", (resolution, resolution), backdrop)
    whole.paste(flat.resize((width, height), PIL.Image.Resampling.BICUBIC), (x, y))
    return whole


def padded(length: int, longest: int, resolution: int) -> tuple[int, int]:
    """Where fit "pad" puts a side of `length` pixels: how many it gets of `resolution`, and after how many of border.

    Example:
        >>> padded(100, 200, 96), padded(200, 200, 96)
        ((48, 24), (96, 0))
    """
    size = max(1, round(length * resolution / longest))
    return size, (resolution - size) // 2


def image_to_tensor(image: PIL.Image.Image) -> Float[Tensor, "3 H W"]:
    """An RGB picture as values in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1.0


def tensor_to_image(pixels: Float[Tensor, "3 H W"], gray: bool = False) -> PIL.Image.Image:
    """Values in [-1, 1] as an RGB picture, or as an "L" one of their channel mean."""
    values = pixels.detach().float().cpu()
    if gray:
        values = values.mean(dim=0, keepdim=True)
    array = ((values.clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return PIL.Image.fromarray(array[..., 0] if gray else array)


class VQTokenizer(nn.Module):
    """taming's `VQModel` without its loss: encoder, 1x1 convolution, nearest codebook vector, 1x1 convolution, decoder.

    Example:
        >>> tokenizer = VQTokenizer(VQConfig())
        >>> tokenizer.encode(PIL.Image.new("L", (96, 96))).shape
        torch.Size([12, 12])

    Raises:
        ImportError: taming-transformers-rom1504 is not installed; the text holds the pip line.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        try:
            from taming.modules.diffusionmodules.model import Decoder, Encoder
            from taming.modules.vqvae.quantize import VectorQuantizer2
        except ImportError as error:
            raise ImportError(
                "the image tokenizer needs taming: pip install --no-deps taming-transformers-rom1504"
            ) from error
        self.config = config
        folded = config.in_channels * config.patch**2
        ddconfig: dict[str, Any] = {
            "ch": config.ch,
            "out_ch": folded,
            "ch_mult": config.ch_mult,
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": config.attn_resolutions,
            "in_channels": folded,
            "resolution": config.resolution // config.patch,
            "z_channels": config.z_channels,
        }
        self.encoder = Encoder(**ddconfig, double_z=False)
        with contextlib.redirect_stdout(io.StringIO()):  # taming's decoder prints its shape
            self.decoder = Decoder(**ddconfig)
        self.quantize = VectorQuantizer2(
            config.n_embed, config.embed_dim, beta=0.25, remap=None, sane_index_shape=True, legacy=False
        )
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def codebook(self) -> Float[Tensor, "K E"]:
        """The vectors of all codes."""
        return self.quantize.embedding.weight

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.config.n_embed

    @property
    def downsampling(self) -> int:
        """Pixels a code stands for, along one side."""
        return self.config.downsampling

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Codes (h, w) of a picture of height x width pixels.

        Raises:
            UserError: a side is not a multiple of `downsampling`.
        """
        factor = self.downsampling
        if height % factor or width % factor or not height or not width:
            raise UserError(
                f"{height}x{width} pixels: both sides must be multiples of {factor} for this image tokenizer"
            )
        return height // factor, width // factor

    # Tensors ------------------------------------------------------------------------------------------------

    def pixels_to_latent(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B E h w"]:
        """Values in [-1, 1] to the vectors that the codebook will replace."""
        self.grid(*pixels.shape[-2:])
        return self.quant_conv(self.encoder(functional.pixel_unshuffle(pixels, self.config.patch)))

    def quantize_latent(
        self, latent: Float[Tensor, "B E h w"]
    ) -> tuple[Float[Tensor, "B E h w"], Float[Tensor, ""], Int[Tensor, "B h w"]]:
        """Nearest codebook vectors (straight-through gradient), taming's codebook loss and the codes, in fp32."""
        with torch.autocast(latent.device.type, enabled=False):
            quantized, loss, (_, _, codes) = self.quantize(latent.float())
        return quantized, loss, codes

    def latent_to_pixels(self, latent: Float[Tensor, "B E h w"]) -> Float[Tensor, "B C H W"]:
        """Vectors to values around [-1, 1], not clamped."""
        return functional.pixel_shuffle(self.decoder(self.post_quant_conv(latent)), self.config.patch)

    def codes_to_pixels(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C H W"]:
        """Codes to values in [-1, 1].

        Raises:
            ValueError: codes are not [B, h, w] or not in 0..K-1.
        """
        if codes.ndim != 3:
            raise ValueError(f"codes must be [B, h, w], got {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"codes must lie in 0..{self.codebook_size - 1}, got {int(codes.min())}..{int(codes.max())}"
            )
        shape = (*codes.shape, self.config.embed_dim)
        latent = self.quantize.get_codebook_entry(codes.to(self.device).reshape(-1), shape)
        return self.latent_to_pixels(latent).clamp(-1.0, 1.0)

    def forward(
        self, pixels: Float[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, ""], Int[Tensor, "B h w"]]:
        """(reconstruction, codebook loss, codes): all that training needs. The loss is 1711.00937's second and third
        terms, the third (commitment) times 0.25."""
        quantized, loss, codes = self.quantize_latent(self.pixels_to_latent(pixels))
        return self.latent_to_pixels(quantized), loss, codes

    def prepare_at(self, resolution: int) -> None:
        """Take pictures of another size from now on; the weights are the same, and so is where attention is.

        Raises:
            UserError: `resolution` is no multiple of `downsampling`.
        """
        before = self.config
        sides = tuple(side * resolution // before.resolution for side in before.attn_resolutions)
        self.config = replace(before, resolution=resolution, attn_resolutions=sides)

    # Pictures -----------------------------------------------------------------------------------------------

    def prepare(self, image: PIL.Image.Image | str | Path | Pixels, gray: bool = False) -> PIL.Image.Image:
        """`prepare_image` as this tokenizer wants it: at `config.resolution`, with `config.fit`."""
        return prepare_image(image, self.config.resolution, gray, self.config.fit)

    @torch.no_grad()
    def encode(
        self, image: PIL.Image.Image | Sequence[PIL.Image.Image] | Float[Tensor, "B C H W"], gray: bool = False
    ) -> Int[Tensor, "*B h w"]:
        """Codes of a picture [h, w], of a list of pictures [B, h, w], or of values in [-1, 1] [B, h, w].

        Pictures go through `prepare`, which leaves prepared ones as they are; tensors are taken as they are.
        """
        if isinstance(image, PIL.Image.Image):
            return self.encode([image], gray)[0]
        if not isinstance(image, Tensor):
            image = torch.stack([image_to_tensor(self.prepare(one, gray)) for one in image])
        return self.quantize_latent(self.pixels_to_latent(image.to(self.device)))[2]

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "*B h w"], gray: bool = False) -> PIL.Image.Image | list[PIL.Image.Image]:
        """A picture from codes [h, w], a list of pictures from [B, h, w]; mode "L" of the channel mean when `gray`."""
        if codes.ndim == 2:
            return tensor_to_image(self.codes_to_pixels(codes[None])[0], gray)
        return [tensor_to_image(pixels, gray) for pixels in self.codes_to_pixels(codes)]

    @torch.no_grad()
    def decode_vectors(self, vectors: Float[Tensor, "h w E"], gray: bool = False) -> PIL.Image.Image:
        """A picture from a vector a code, which need not be one of the codebook's."""
        latent = vectors.to(self.device).movedim(-1, 0)[None]
        return tensor_to_image(self.latent_to_pixels(latent)[0].clamp(-1.0, 1.0), gray)

    # Folders ------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, manifest: Mapping[str, Any] | None = None) -> None:
        """Writes config.json, model.safetensors and manifest.json (their sha256, and what `manifest` adds).

        Each file is written aside and renamed; the old manifest goes first, so that a killed save leaves no false hash.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        # not save_file: it makes files that only their owner may read
        (folder / f"{WEIGHTS_NAME}.partial").write_bytes(save(state, metadata={"format": "pt"}))
        _write_json(folder / f"{CONFIG_NAME}.partial", asdict(self.config))
        hashes = {name: _sha256(folder / f"{name}.partial") for name in (CONFIG_NAME, WEIGHTS_NAME)}
        _write_json(folder / f"{MANIFEST_NAME}.partial", {**(manifest or {}), "sha256": hashes})
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for name in (CONFIG_NAME, WEIGHTS_NAME, MANIFEST_NAME):
            os.replace(folder / f"{name}.partial", folder / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VQTokenizer:
        """A tokenizer in evaluation mode from a folder of `save_pretrained`.

        Raises:
            UserError: folder or file missing, sha256 not that of manifest.json, unknown key, weights that do not fit.
        """
        folder = Path(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise UserError(f"image tokenizer {folder}: {name} is missing; give a folder that holds it")
        if (folder / MANIFEST_NAME).is_file():
            for name, expected in _read_json(folder / MANIFEST_NAME).get("sha256", {}).items():
                if not (folder / name).is_file() or _sha256(folder / name) != expected:
                    raise UserError(
                        f"image tokenizer {folder}: {name} is not the file manifest.json names; fetch it again"
                    )
        config = _config_from(_read_json(folder / CONFIG_NAME), folder / CONFIG_NAME)
        try:
            state = load_file(folder / WEIGHTS_NAME)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / WEIGHTS_NAME} is not a readable safetensors file ({error})") from error
        return cls._from_state(config, state, folder / WEIGHTS_NAME)

    @classmethod
    def from_taming(cls, ckpt: str | Path, config: str | Path) -> VQTokenizer:
        """A tokenizer from a checkpoint of taming or Chameleon and the yaml that came with it.

        Such files pickle classes of pytorch-lightning beside the tensors. `torch.load(weights_only=True)` reads them
        here with an inert stand-in for every class or function that torch does not trust: no foreign code runs.

        Raises:
            UserError: a file is missing or unreadable, the yaml is not a VQModel's, or the weights do not fit it.
        """
        ckpt, config = Path(ckpt), Path(config)
        for path in (ckpt, config):
            if not path.is_file():
                raise UserError(f"{path} does not exist")
        state = read_checkpoint(ckpt)
        weights = {name: value for name, value in state.items() if not name.startswith("loss.")}
        return cls._from_state(_config_from_taming(config), weights, ckpt)

    @classmethod
    def _from_state(cls, config: VQConfig, state: Mapping[str, Tensor], where: Path) -> VQTokenizer:
        tokenizer = cls(config)
        expected = tokenizer.state_dict()
        for problem, names in (
            ("lacks", expected.keys() - state.keys()),
            ("has unknown", state.keys() - expected.keys()),
        ):
            if names:
                raise UserError(f"{where} {problem} {len(names)} weights of its config, first {sorted(names)[0]}")
        for name, value in expected.items():
            if value.shape != state[name].shape:
                raise UserError(f"{where}: {name} is {list(state[name].shape)}, its config says {list(value.shape)}")
        tokenizer.load_state_dict(state)
        return tokenizer.eval()


def _config_from(values: Mapping[str, Any], where: Path) -> VQConfig:
    known = {field.name for field in fields(VQConfig)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if (fit := values.get("fit", "crop")) not in get_args(Fit):
        raise UserError(f"{where}: fit is {fit!r}: one of {', '.join(get_args(Fit))}")
    typed: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return VQConfig(**typed)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def _config_from_taming(path: Path) -> VQConfig:
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        ddconfig = params["ddconfig"]
        if ddconfig.get("double_z") or ddconfig["out_ch"] != ddconfig["in_channels"] or params.get("remap"):
            raise UserError(f"{path} is not a plain VQModel (double_z, remap, or out_ch other than in_channels)")
        return VQConfig(
            resolution=ddconfig["resolution"],
            ch=ddconfig["ch"],
            ch_mult=tuple(ddconfig["ch_mult"]),
            num_res_blocks=ddconfig["num_res_blocks"],
            attn_resolutions=tuple(ddconfig["attn_resolutions"]),
            z_channels=ddconfig["z_channels"],
            embed_dim=params["embed_dim"],
            n_embed=params["n_embed"],
            in_channels=ddconfig["in_channels"],
            patch=1,
        )
    except (KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not the yaml of a taming VQModel: model.params.ddconfig ({error})") from error


class _Inert:
    """Takes the place of a pickled foreign class or function and does nothing."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint; no foreign code runs (see `VQTokenizer.from_taming`).

    Raises:
        UserError: it cannot be read, or holds no named tensors.
    """
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stubs: list[Any] = [(type("_Inert", (_Inert,), {}), name) for name in foreign]
        with torch.serialization.safe_globals(stubs):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a torch checkpoint of tensors ({reason})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state_dict of tensors")
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object")
    return values


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
