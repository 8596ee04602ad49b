"""A pretrained language model as the start of a training run: its tokenizer, its rows, and new ones for codes and tags.

Shape letters: B batch, L length, V rows of the backbone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ChameleonForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from medim.config import options
from medim.diffusion import ScheduleName
from medim.errors import UserError
from medim.model.adaln import hooked_modules
from medim.model.backbone import NewRows, decoder_layers, grow_vocabulary, own_code_rows
from medim.model.medim import SHIFTS, Logits, MeDiMModel, Positions
from medim.pipeline import MeDiM
from medim.sampling import Sampling
from medim.tokenization.image import VQTokenizer
from medim.tokenization.joint import JointTokenizer, SlotOptions
from medim.tokenization.text import TextTokenizer

LIQUID = (256_000, 8192)  # Liquid's first image row and its codes, behind Gemma's tokens (arXiv 2412.04332)
PROBE = 16  # tokens of the check that nothing was lost


@options
class BackboneStart:
    """What is made of the backbone.

    Attributes:
        adaln_dim: width of the time embedding.
        places: codes of an image that get a learnt place of their own; 0: none.
        num_layers: keep only the first so many decoder layers; 0 keeps all, as a backbone should.
        rows: new rows of codes: drawn from the mean and covariance of the table (moments), or with them, but alike
            where codes look alike (codebook). Rows of tags are always drawn.
        logits: where text is read: at its own position (plain), or one before it, as a decoder is trained (shifted).
        image_row: the backbone's own row of code 0, where its codes lie in order; -1: as the architecture says, which
            Chameleon and Liquid do.
        schedule: the noise schedule it will be trained with (objective.schedule).
        seed: of the new rows and the time embedding.
        dtype: of the weights that are written.
        positions: as their numbers in the row, or shared by codes at one place of a study's images (aligned).
        embed: width of the embeddings that objective.align and objective.invariance train; 0: none.
        gates: learn how strongly segments attend to each other.
        alibi: slopes of 2-D ALiBi, repeated over the heads; needs places.
    """

    adaln_dim: Annotated[int, Field(ge=2)] = 128
    places: Annotated[int, Field(ge=0)] = 0
    num_layers: Annotated[int, Field(ge=0)] = 0
    rows: NewRows = "moments"
    logits: Logits = "plain"
    image_row: int = -1
    schedule: ScheduleName = "linear"
    seed: int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    positions: Positions = "row"
    embed: Annotated[int, Field(ge=0)] = 0
    gates: bool = False
    alibi: tuple[float, ...] = ()


@options
class StartOptions:
    """What `medim init` can be told."""

    model: BackboneStart = BackboneStart()
    slot: SlotOptions = SlotOptions()


@dataclass(frozen=True)
class Started:
    """What `start` has made, and what should be said of it.

    Attributes:
        difference: of the logits from the backbone's without its causal mask, at most, in their standard deviations.
    """

    model: MeDiM
    difference: float
    notes: Sequence[str] = field(default_factory=tuple)


def start(source: str | Path, image_tokenizer: str | Path, o: StartOptions) -> Started:
    """A model to train from a HuggingFace folder, a hub name or a GGUF file.

    Raises:
        UserError: no such model, one that is no pre-norm decoder, damaged or pickled weights, a tokenizer that is not
            its own, an image tokenizer of another codebook than its rows, or outputs that differ from the backbone's.
    """
    image, notes = VQTokenizer.from_pretrained(image_tokenizer), []
    backbone, text = load_backbone(source, o.model.num_layers), load_text_tokenizer(source)
    rows, layers = len(_table(backbone)), len(decoder_layers(backbone))
    if text.size > rows:
        raise UserError(
            f"{source}: its tokenizer has {text.size} tokens, its table {rows} rows: it is not the backbone's"
        )
    if o.model.num_layers:
        notes.append(
            f"ONLY THE FIRST {layers} LAYERS ARE KEPT, as model.num_layers says: most of what was learnt is lost"
        )
    if backbone.config._attn_implementation != "sdpa":
        notes.append(f"attention by {backbone.config._attn_implementation}: sdpa cannot cap attention logits")
    first = _first_code(backbone, image.codebook_size, o.model.image_row, str(source))
    if first is not None:
        notes.append(f"image codes take the backbone's own rows {first} to {first + image.codebook_size - 1}")
    probe = torch.randint(text.size, (1, PROBE), generator=torch.Generator().manual_seed(o.model.seed))
    wanted = _logits(backbone, probe)
    joint = JointTokenizer.build(text, image, o.slot, rows, first)
    vocabulary = joint.vocabulary
    codes = vocabulary.image if first is None and o.model.rows == "codebook" else None
    grow_vocabulary(backbone, vocabulary.size, codes, image.codebook, o.model.seed)
    torch.manual_seed(o.model.seed)
    read: Any = SHIFTS[o.model.logits]
    own = {name: getattr(o.model, name) for name in ("places", "schedule", "positions", "embed", "gates", "alibi")}
    model = MeDiMModel.from_backbone(backbone, vocabulary, o.model.adaln_dim, read=read, **own).eval()
    difference = _difference(model, probe, wanted)
    if difference > 1e-3:
        raise UserError(
            f"{source}: {type(backbone).__name__} gives other logits inside MeDiM ({difference:.2g} standard "
            "deviations): its forward pass does more than its decoder and its head; this class is not supported"
        )
    if o.model.dtype == "bf16":
        model.to(torch.bfloat16)
    return Started(MeDiM(model, joint, {}, Sampling(), str(source)), difference, notes)


def load_backbone(source: str | Path, num_layers: int = 0) -> PreTrainedModel:
    """A pretrained decoder in fp32, bidirectional.

    Raises:
        UserError: see `start`.
    """
    folder, gguf = _places(source)
    if gguf is not None and num_layers:
        raise UserError(
            f"model.num_layers: layers of a GGUF file are loaded together; convert {source} to a folder first"
        )
    config = _config(folder, gguf, source)
    if num_layers:
        if num_layers > config.num_hidden_layers:
            raise UserError(f"model.num_layers={num_layers}: {source} has {config.num_hidden_layers}")
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    config.is_causal = False
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    loader: Any = ChameleonForConditionalGeneration if config.model_type == "chameleon" else AutoModelForCausalLM
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded, said = loader.from_pretrained(
                folder, config=config, dtype=torch.float32, use_safetensors=None if gguf else True,
                attn_implementation="eager" if capped else "sdpa", output_loading_info=True,
                **({"gguf_file": gguf} if gguf else {}),
            )  # fmt: skip
    except ImportError as error:
        raise UserError(f"{source}: {_line(error)}; for GGUF files: pip install gguf") from error
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise UserError(f"{source}: weights cannot be loaded ({_line(error)})") from error
    missing = sorted(set(said["missing_keys"])) + sorted(map(str, said["mismatched_keys"]))
    if missing and not gguf:
        raise UserError(f"{source}: weights do not fit config.json: {len(missing)} are missing, first {missing[0]}")
    for layer in decoder_layers(loaded):
        hooked_modules(layer)
    _forget(loaded.config)
    return loaded.eval()


def _forget(config: PreTrainedConfig) -> None:
    """What the config says of where it came from, and of a padding token: here ``<eos>`` fills slots and is learnt."""
    config._name_or_path, config.pad_token_id = "", None
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _places(source: str | Path) -> tuple[str, str | None]:
    """The folder or hub name, and the GGUF file in it."""
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{source}: no such file")
        return str(path.parent), path.name
    if path.is_dir():
        if (path / "canvas.json").is_file():
            raise UserError(f"{source}: is a model of MeDiM already: train it further with init: {source}")
        if not (path / "config.json").is_file():
            files = sorted(path.glob("*.gguf"))
            hint = f"; name the file: {files[0]}" if files else ""
            raise UserError(f"{source}: no config.json in it: not a HuggingFace model folder{hint}")
        if not any(path.glob("*.safetensors")):
            pickled = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
            if pickled:
                raise UserError(
                    f"{source}: {pickled[0].name} is a pickle, which is not loaded here; convert it once, tensors "
                    f"only: medim import weights {source} --out DIR"
                )
            raise UserError(f"{source}: holds no *.safetensors")
    elif path.suffix or str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise UserError(f"{source}: no such folder or GGUF file, and not a hub name such as HuggingFaceTB/SmolLM2-135M")
    return str(source), None


def _config(folder: str, gguf: str | None, source: str | Path) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {}))
    except ImportError as error:
        raise UserError(f"{source}: {_line(error)}; for GGUF files: pip install gguf") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{source}: config.json cannot be read, or the hub not reached ({_line(error)})") from error
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UserError(f"{source}: {kind} is an encoder-decoder; MeDiM needs a decoder-only language model")
    named = (config.architectures or [""])[0]
    if (kind != "chameleon" and type(config) not in AutoModelForCausalLM._model_mapping) or "MaskedLM" in named:
        raise UserError(f"{source}: {named or kind} is no decoder-only language model, which MeDiM needs")
    if hasattr(config, "text_config") and kind != "chameleon":
        raise UserError(f"{source}: {kind} has parts beside its decoder; give a text-only model of its family")
    return config


def load_text_tokenizer(source: str | Path) -> TextTokenizer:
    """The tokenizer that lies beside a backbone.

    Raises:
        UserError: there is none, or it has no end of text.
    """
    folder, gguf = _places(source)
    try:
        return TextTokenizer(AutoTokenizer.from_pretrained(folder, **({"gguf_file": gguf} if gguf else {})))
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{source}: no tokenizer of its own can be loaded ({_line(error)})") from error


def _first_code(backbone: PreTrainedModel, codebook: int, asked: int, source: str) -> int | None:
    """The backbone's own row of code 0, its rows put in the order of the codes; None: it has no rows for codes.

    Raises:
        UserError: the backbone has rows for another number of codes.
    """
    rows, kind = len(_table(backbone)), backbone.config.model_type
    own: list[int] = []
    if asked >= 0:
        own = list(range(asked, asked + codebook))
        if own[-1] >= rows:
            raise UserError(f"model.image_row={asked}: {codebook} codes from there on are more than the {rows} rows")
    elif kind == "chameleon":
        table = backbone.model.vocabulary_mapping.img2bpe
        own = [table[code] for code in range(len(table))]
    elif kind == "gemma" and rows >= sum(LIQUID):
        own = list(range(LIQUID[0], sum(LIQUID)))
    if own and len(own) != codebook:
        raise UserError(
            f"{source}: has rows for {len(own)} image codes, the image tokenizer has {codebook}: give the tokenizer "
            "that the backbone was trained with"
        )
    if not own:
        return None
    first = own_code_rows(backbone, own)
    if first is None:
        raise UserError(f"{source}: its rows for image codes are not one block; this checkpoint is not supported")
    return first


def _table(backbone: PreTrainedModel) -> Tensor:
    table: Any = backbone.get_input_embeddings()
    return table.weight


@torch.no_grad()
def _logits(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    return backbone(ids, use_cache=False).logits[..., : len(_table(backbone))].clone()


@torch.no_grad()
def _difference(model: MeDiMModel, ids: Tensor, wanted: Tensor) -> float:
    """Of the logits over text; ids that the backbone itself rules out are left out."""
    found = model.head(model(ids, torch.full(ids.shape, 0.5)))[..., : wanted.shape[-1]]
    kept = wanted > torch.finfo(wanted.dtype).min
    return float((found - wanted)[kept].abs().max() / wanted[kept].std())


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
