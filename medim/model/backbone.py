"""A HuggingFace decoder, made bidirectional by the library's own switch."""

from __future__ import annotations

from dataclasses import field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from medim.config import options


@options
class BackboneOptions:
    """Shape of a backbone made from scratch (`transformers.LlamaConfig` field names).

    Attributes:
        rotary_fraction: share of each head's dimensions that rotate with position; the slow rest compares contents
            whatever the distance (p-RoPE, Barbero et al. 2024, arXiv 2410.06205).
    """

    model_type: str = "llama"
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 704
    rope_theta: float = 1000.0
    rotary_fraction: float = 1.0
    attn_implementation: str = "sdpa"
    extra: dict[str, Any] = field(default_factory=dict)


def config_from_options(o: BackboneOptions, vocabulary_size: int) -> PreTrainedConfig:
    """The `transformers` config of a new bidirectional backbone with V = `vocabulary_size` rows."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": o.rope_theta}
    if o.rotary_fraction < 1:
        rope |= {"rope_type": "proportional", "partial_rotary_factor": o.rotary_fraction}
    config = AutoConfig.for_model(
        o.model_type,
        vocab_size=vocabulary_size,
        hidden_size=o.hidden_size,
        num_hidden_layers=o.num_hidden_layers,
        num_attention_heads=o.num_attention_heads,
        num_key_value_heads=o.num_key_value_heads,
        intermediate_size=o.intermediate_size,
        rope_parameters=rope,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **o.extra,
    )
    config._attn_implementation = o.attn_implementation
    return config


def make_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A decoder with language-model head and fresh weights, every position attending to every valid one."""
    config.is_causal = False
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)


def decoder_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder, under the name all Llama-like classes give them.

    Raises:
        TypeError: the class has no `get_decoder().layers`.
    """
    layers = getattr(backbone.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise TypeError(f"{type(backbone).__name__} has no decoder layers that AdaLN could be attached to")
    return layers


def grow_vocabulary(backbone: PreTrainedModel, size: int) -> None:
    """Append rows to both embedding matrices up to V = `size`: drawn from the old rows' mean and covariance."""
    rows: Tensor = backbone.get_input_embeddings().weight  # type: ignore[assignment]
    if len(rows) > size:
        raise ValueError(f"the backbone has more rows than the vocabulary's {size}: rows are never cut")
    with torch.no_grad():
        backbone.resize_token_embeddings(size, mean_resizing=True)
