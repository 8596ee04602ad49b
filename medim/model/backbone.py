"""A HuggingFace decoder, made bidirectional by the library's own switch, and rows for what it never saw.

Shape letters: V rows of a table, N new rows, D hidden width, K codes, E codebook width.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    ChameleonForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from medim.config import options
from medim.errors import UserError

NewRows = Literal["moments", "codebook"]
Size = Annotated[int, Field(ge=1)]


@options
class BackboneOptions:
    """Shape of a backbone made from scratch (`transformers.LlamaConfig` field names).

    Attributes:
        extra: more fields of the config class, or others than ours.
        rotary_fraction: share of each head's dimensions that rotate with position; the slow rest compares contents
            whatever the distance (p-RoPE, Barbero et al. 2024, arXiv 2410.06205).
    """

    model_type: str = "llama"
    hidden_size: Size = 256
    num_hidden_layers: Size = 4
    num_attention_heads: Size = 4
    num_key_value_heads: Size = 4
    intermediate_size: Size = 704
    rope_theta: float = 1000.0
    rotary_fraction: float = 1.0
    attn_implementation: str = "sdpa"
    extra: dict[str, Any] = field(default_factory=dict)


def config_from_options(o: BackboneOptions, vocabulary_size: int) -> PreTrainedConfig:
    """The `transformers` config of a new bidirectional backbone with V = `vocabulary_size` rows.

    Raises:
        UserError: numbers of heads that do not fit, or a model type that transformers does not know.
    """
    heads = o.num_attention_heads
    if heads % o.num_key_value_heads:
        raise UserError(f"model.backbone.num_key_value_heads={o.num_key_value_heads}: does not divide {heads} heads")
    if o.hidden_size % (2 * heads) and "head_dim" not in o.extra:
        raise UserError(f"model.backbone.hidden_size={o.hidden_size}: {heads} heads have no even width of it each")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": o.rope_theta}
    if o.rotary_fraction < 1:
        rope |= {"rope_type": "proportional", "partial_rotary_factor": o.rotary_fraction}
    shape: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": o.hidden_size,
        "num_hidden_layers": o.num_hidden_layers,
        "num_attention_heads": o.num_attention_heads,
        "num_key_value_heads": o.num_key_value_heads,
        "intermediate_size": o.intermediate_size,
        "rope_parameters": rope,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if o.model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(o.model_type, CONFIG_MAPPING.keys(), 1)
        hint = f'did you mean "{near[0]}"?' if near else "such as llama, qwen3, gemma2"
        raise UserError(f"model.backbone.model_type={o.model_type}: unknown to transformers; {hint}")
    config = AutoConfig.for_model(o.model_type, **(shape | o.extra))
    config._attn_implementation = o.attn_implementation
    return config


def make_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder with language-model head and fresh weights, every position attending to every valid one."""
    config.is_causal = False
    config.use_cache = False
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        config._attn_implementation = "eager"  # sdpa cannot cap attention logits
    if config.model_type == "chameleon":
        model = ChameleonForConditionalGeneration._from_config(config, attn_implementation=config._attn_implementation)
        model.model.vqmodel = nn.Identity()  # images are encoded by MeDiM's own tokenizer
        return model
    return AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)


def window_of(config: PreTrainedConfig) -> int | None:
    """The distance up to which sliding-window layers attend, None where there are no such layers."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def decoder_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder, under the name all Llama-like classes give them.

    Raises:
        UserError: the class has no `get_decoder().layers`.
    """
    layers = getattr(backbone.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UserError(f"{type(backbone).__name__} has no decoder layers that AdaLN could be attached to")
    return layers


@torch.no_grad()
def grow_vocabulary(
    backbone: PreTrainedModel,
    size: int,
    codes: tuple[int, int] | None = None,
    codebook: Float[Tensor, "K E"] | None = None,
    seed: int = 0,
) -> None:
    """Append rows to both tables up to V = `size`, each by itself if they are not tied: `drawn_rows` of the old ones.

    Args:
        codes: the range of the image codes' rows; with `codebook`, their vectors, those are `kernel_rows`.

    Raises:
        ValueError: the backbone has more rows already.
    """
    old = len(_tables(backbone)[0])
    if old > size:
        raise ValueError(f"the backbone has more rows than the vocabulary's {size}: rows are never cut")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of resizing: the rows it makes are replaced below
        backbone.resize_token_embeddings(size, mean_resizing=False)
    for number, weight in enumerate(_tables(backbone)):
        generator = torch.Generator().manual_seed(2 * seed + number)
        weight[old:] = drawn_rows(weight[:old], size - old, generator).to(weight)
        if codes is not None and codebook is not None:
            weight[slice(*codes)] = kernel_rows(weight[:old], codebook, generator).to(weight)


def drawn_rows(table: Float[Tensor, "V D"], count: int, generator: torch.Generator) -> Float[Tensor, "N D"]:
    """Rows from the normal distribution with the mean and the covariance of a table's rows (Hewitt 2021, "Initializing
    new word embeddings for pretrained language models", with the whole covariance)."""
    mean, factor = _moments(table)
    return mean + torch.randn(count, table.shape[1], generator=generator, dtype=mean.dtype) @ factor.T


def kernel_rows(
    table: Float[Tensor, "V D"], codebook: Float[Tensor, "K E"], generator: torch.Generator
) -> Float[Tensor, "K D"]:
    """Rows with the mean and about the covariance of a table's, of which those of two codes at a distance d are as much
    alike as exp(-d^2 / 2 w^2) says: random Fourier features (Rahimi and Recht 2007, section 3) of codebook vectors.

    The width w is the distance from a code to its eighth neighbour, the median over 1,024 codes.
    """
    mean, factor = _moments(table)
    vectors = codebook.detach().cpu().double()
    some = vectors[:: -(-len(vectors) // 1024)]
    neighbour = torch.cdist(some, vectors).kthvalue(min(9, len(vectors)), dim=1).values  # the first is the code itself
    width = neighbour.median().clamp(min=torch.finfo(torch.float32).tiny)
    frequencies = torch.randn(vectors.shape[1], table.shape[1], generator=generator, dtype=mean.dtype) / width
    phases = 2 * math.pi * torch.rand(table.shape[1], generator=generator, dtype=mean.dtype)
    features = math.sqrt(2) * torch.cos(vectors @ frequencies + phases)
    return mean + (features - features.mean(0)) @ factor.T


def _moments(rows: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor]:
    """Mean [D] and a factor F [D, D] of the covariance F F^T."""
    rows = rows.detach().cpu().double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / max(1, len(rows) - 1))
    return mean, vectors * values.clamp(min=0).sqrt()


@torch.no_grad()
def own_code_rows(backbone: PreTrainedModel, ids: Sequence[int]) -> int | None:
    """Put a backbone's own rows for image codes in the order of the codes; returns the row of code 0.

    Args:
        ids: of each code, the backbone's row. None is returned, and nothing done, if those are not one block of rows.
    """
    first, wanted = min(ids), torch.tensor(ids)
    if sorted(ids) != list(range(first, first + len(ids))):
        return None
    for weight in _tables(backbone):
        weight[first : first + len(ids)] = weight[wanted].clone()
    return first


def _tables(backbone: PreTrainedModel) -> list[Tensor]:
    """The input and the output embedding [V, D], once if they are tied."""
    modules: Any = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
    return list({id(one.weight): one.weight for one in modules}.values())
