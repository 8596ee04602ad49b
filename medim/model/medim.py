"""The denoiser network: a bidirectional decoder, AdaLN for the noise level, a head restricted to what is needed.

Shape letters: B batch, L canvas length, T noise levels a row, D hidden width, N selected rows, V joint vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from medim.canvas import Canvas
from medim.config import options
from medim.diffusion import Group, Schedule, ScheduleName
from medim.model.adaln import AdaLN, TimeEmbedding
from medim.model.backbone import BackboneOptions, config_from_options, decoder_layers, grow_vocabulary, make_backbone
from medim.model.head import restricted_logits
from medim.vocabulary import KINDS, Vocabulary


@options
class ModelOptions:
    """A model made from scratch.

    Attributes:
        places: codes of an image that get a learnt place of their own, added to their embedding; 0 is none.
    """

    backbone: BackboneOptions = BackboneOptions()
    adaln_dim: int = 128
    places: int = 0


ConditionAttention = Literal["full", "prefix"]


class MeDiMConfig(PreTrainedConfig):
    """What `config.json` holds: the backbone's own config, the joint vocabulary, the width of the time embedding, and
    what a sampler must know of the training: its noise schedule, how often it dropped the condition (0: guidance has no
    branch to compare with), and whether given segments attend to generated ones (`condition_attention`)."""

    model_type = "medim"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        vocabulary: dict[str, Any] | None = None,
        adaln_dim: int = 128,
        schedule: ScheduleName = "linear",
        places: int = 0,
        condition_dropout: float = 0.0,
        condition_attention: ConditionAttention = "full",
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.vocabulary = vocabulary or {}
        self.adaln_dim = adaln_dim
        self.schedule = schedule
        self.places = places
        self.condition_dropout = condition_dropout
        self.condition_attention = condition_attention
        super().__init__(**kwargs)


class PlaceEmbedding(nn.Embedding):
    """Where in its image a code is; index 0 is nowhere. Zero at the start, where a pretrained model is unchanged."""


class MeDiMModel(PreTrainedModel):
    """p(x_0 | x_t) over the joint vocabulary. At step 0 it is the backbone without its causal mask, to 1e-5.

    Save and load by `save_pretrained` / `from_pretrained`; start from a plain language model by `from_backbone`.
    """

    config_class = MeDiMConfig
    config: MeDiMConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MeDiMConfig) -> None:
        super().__init__(config)
        inner = AutoConfig.for_model(**config.backbone)
        inner._attn_implementation = config._attn_implementation or "sdpa"
        self.vocabulary = Vocabulary.from_dict(config.vocabulary)
        self.backbone = make_backbone(inner)
        self.place = PlaceEmbedding(config.places + 1, inner.hidden_size) if config.places else None
        self.time = TimeEmbedding(config.adaln_dim)
        self.adaln = nn.ModuleList(
            AdaLN(config.adaln_dim, inner.hidden_size) for _ in range(len(decoder_layers(self.backbone)))
        )
        for adaln, layer in zip(self.adaln, decoder_layers(self.backbone), strict=True):
            assert isinstance(adaln, AdaLN)
            adaln.attach(layer)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AdaLN):
            module.reset()
        elif isinstance(module, PlaceEmbedding):
            nn.init.zeros_(module.weight)
        elif isinstance(module, TimeEmbedding):
            for linear in module.linears:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    @classmethod
    def from_options(cls, o: ModelOptions, vocabulary: Vocabulary) -> MeDiMModel:
        """A model with fresh weights."""
        backbone = config_from_options(o.backbone, vocabulary.size)
        config = MeDiMConfig(backbone.to_dict(), vocabulary.to_dict(), o.adaln_dim, places=o.places)
        config._attn_implementation = o.backbone.attn_implementation
        return cls(config)

    @classmethod
    def from_backbone(cls, source: str | Path, vocabulary: Vocabulary, adaln_dim: int = 128) -> MeDiMModel:
        """A pretrained language model with its weights, without its causal mask, with rows for codes and tags.

        Args:
            source: a folder or hub name that `AutoModelForCausalLM.from_pretrained` takes.
        """
        pretrained = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        grow_vocabulary(pretrained, vocabulary.size)
        model = cls(MeDiMConfig(pretrained.config.to_dict(), vocabulary.to_dict(), adaln_dim))
        model.backbone.load_state_dict(pretrained.state_dict())
        return model

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the weights were trained with."""
        return Schedule(self.config.schedule)

    @property
    def output_weight(self) -> Float[Tensor, "V D"]:
        """The output matrix, tied or not."""
        return self.backbone.get_output_embeddings().weight

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        ids: Int[Tensor, "B L"],
        t: Float[Tensor, "B T"],
        level: Int[Tensor, "B L"] | None = None,
        valid: Bool[Tensor, "B L"] | None = None,
        place: Int[Tensor, "B L"] | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Hidden states after the last norm; logits are their product with rows of `output_weight`.

        Args:
            t: noise levels in [0, 1], T a row.
            level: which of the T levels each position has; None: T = L, each its own.
            valid: False at padding, which is attended to by no position.
            place: number of a code within its image, from 1 (`Canvas.place`); left out, codes have no place.
        """
        embedded = self.backbone.get_input_embeddings()(ids)
        if self.place is not None and place is not None:
            embedded = embedded + self.place(place.clamp(max=self.config.places))
        return self.backbone.get_decoder()(
            inputs_embeds=embedded, attention_mask=valid, use_cache=False, time=self.time(t), level=level
        ).last_hidden_state

    def denoiser(self, canvas: Canvas) -> BoundDenoiser:
        """This model as the callable that samplers and bounds take, on the layout of one canvas."""
        return BoundDenoiser(self, canvas.kind, canvas.valid, canvas.place)


@dataclass(frozen=True)
class BoundDenoiser:
    """A model on one layout: knows which columns each position can hold and what is padding."""

    model: MeDiMModel
    kind: Int[Tensor, "B L"]
    valid: Bool[Tensor, "B L"]
    place: Int[Tensor, "B L"]

    def groups(self, generate: Bool[Tensor, "B L"]) -> list[Group]:
        """Generated positions by kind; kinds that do not occur are left out."""
        groups = []
        kinds = self.kind.repeat(len(generate) // len(self.kind), 1)  # guidance runs the layout twice in one batch
        for number, kind in enumerate(KINDS):
            rows = (generate & (kinds == number)).flatten().nonzero().squeeze(1)
            if len(rows):
                groups.append(Group(rows, *self.model.vocabulary.columns(kind)))
        return groups

    def restricted(
        self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"], groups: Sequence[Group]
    ) -> list[Float[Tensor, "_ _"]]:
        """Logits of each group's rows over its columns."""
        flat = self._hidden(ids, t).flatten(0, 1)
        weight = self.model.output_weight
        return [restricted_logits(flat[group.rows], weight, group.start, group.stop) for group in groups]

    def __call__(self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """All logits; -inf outside the columns of a position's kind."""
        logits = self._hidden(ids, t) @ self.model.output_weight.T
        allowed = torch.zeros(len(KINDS) + 1, logits.shape[-1], dtype=torch.bool, device=logits.device)
        for number, kind in enumerate(KINDS):
            start, stop = self.model.vocabulary.columns(kind)
            allowed[number, start:stop] = True
        allowed[-1] = True  # tags and padding (kind -1): never predicted, so nothing is excluded
        return logits.masked_fill(~allowed[self.kind], -torch.inf)

    def _hidden(self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        copies = len(ids) // len(self.valid)
        return self.model(ids, t, None, self.valid.repeat(copies, 1), self.place.repeat(copies, 1))
