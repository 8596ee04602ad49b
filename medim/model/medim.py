"""The denoiser network: a bidirectional decoder, AdaLN for the noise level, a head restricted to what is needed.

Shape letters: B batch, L canvas length, Q positions that are run, T noise levels a row, D hidden width, V joint
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel

from medim.alignment import TEMPERATURE
from medim.canvas import Canvas
from medim.config import options
from medim.diffusion import Schedule, ScheduleName
from medim.errors import UserError
from medim.model.adaln import AdaLN, AdaLNStart, TimeEmbedding, TimeOptions
from medim.model.attention import attention_of, hidden_keys, key_mask, within
from medim.model.backbone import (
    BackboneOptions,
    NewRows,
    config_from_options,
    decoder_layers,
    grow_vocabulary,
    kernel_rows,
    make_backbone,
    window_of,
)
from medim.model.denoiser import BoundDenoiser
from medim.model.gates import CrossGates, Gated, Marks, added, alibi
from medim.model.head import RestrictedHead
from medim.model.lora import Adapted
from medim.model.rows import SplitHead
from medim.vocabulary import KINDS, Kind, Vocabulary

FORMAT = 1  # of model folders
Logits = Literal["plain", "shifted"]
Positions = Literal["row", "aligned"]
SHIFTS: dict[Logits, dict[Kind, int]] = {"plain": {}, "shifted": {"text": -1}}


@options
class ModelOptions:
    """A model made from scratch.

    Attributes:
        adaln_start: identity: with no effect (at step 0 a pretrained backbone is what it was); random: drawn, each
            branch multiplied by nearly 0, as MeDiM's authors do.
        places: codes of an image that get a learnt place of their own, added to their embedding; 0 is none.
        logits: where the prediction of a text position is read: at the position itself (plain), or one before it, as an
            autoregressive backbone was trained to (shifted). Image codes are read plainly.
        positions: what rotates keys and queries: the number of a position in its row, or one that the codes of all of a
            study's images at one place share (aligned). Aligned codes are told the tags of their image by a learnt
            vector, since nothing else tells them apart.
        rows: rows of codes at the start: drawn as all others (moments), or features of the image tokenizer's codebook
            (codebook), so that codes that look alike start alike: `medim.model.backbone.kernel_rows`.
        embed: width of the embeddings of images and reports by themselves (`MeDiMModel.embed`); 0: there are none.
        gates: whether how strongly the segments of a study attend to each other is learnt, for each pair of modalities
            and by how noisy the one attended to is (`CrossGates`).
        alibi: slopes of 2-D ALiBi, repeated over the heads: how fast a head loses sight of codes away from the place of
            its own, in its image and in others; (): none. Needs `places`, a square of them.
    """

    backbone: BackboneOptions = BackboneOptions()
    adaln_dim: int = 128
    adaln_start: AdaLNStart = "identity"
    places: int = 0
    logits: Logits = "plain"
    positions: Positions = "row"
    rows: NewRows = "moments"
    embed: Annotated[int, pydantic.Field(ge=0)] = 0
    gates: bool = False
    alibi: tuple[float, ...] = ()


ConditionAttention = Literal["full", "prefix"]


class MeDiMConfig(PreTrainedConfig):
    """What `config.json` holds: the backbone's own config, the joint vocabulary, the width of the time embedding, and
    what a sampler must know of the training: its noise schedule, how often it dropped the condition (0: guidance has no
    branch to compare with), how often an image or the report was left off the canvas (`absent`), and whether given
    segments attend to generated ones (`condition_attention`).

    A foreign checkpoint's own ways (`medim.official`) are `time` (`TimeOptions`), `read`, how many positions from its
    own the prediction of a kind is read, and `unseen`, an id whose positions nobody attends to.
    """

    model_type = "medim"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        vocabulary: dict[str, Any] | None = None,
        adaln_dim: int = 128,
        adaln_start: AdaLNStart = "identity",
        schedule: ScheduleName = "linear",
        schedule_power: float = 2.0,
        places: int = 0,
        positions: Positions = "row",
        embed: int = 0,
        gates: bool = False,
        alibi: Sequence[float] = (),
        condition_dropout: float = 0.0,
        absent: float = 0.0,
        condition_attention: ConditionAttention = "full",
        read: dict[str, int] | None = None,
        time: dict[str, Any] | None = None,
        unseen: int | None = None,
        format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        if format > FORMAT:
            raise UserError(f"a model folder of format {format}, this version reads {FORMAT}: install a newer medim")
        self.backbone = backbone or {}
        self.vocabulary = vocabulary or {}
        self.adaln_dim = adaln_dim
        self.adaln_start = adaln_start
        self.schedule = schedule
        self.schedule_power = schedule_power
        self.places = places
        self.positions = positions
        self.embed = embed
        self.gates = gates
        self.alibi = list(alibi)
        self.condition_dropout = condition_dropout
        self.absent = absent
        self.condition_attention = condition_attention
        self.read = read or {}
        self.time = time or asdict(TimeOptions())
        self.unseen = unseen
        self.format = format
        super().__init__(**kwargs)


def config_of(o: ModelOptions, vocabulary: Vocabulary) -> MeDiMConfig:
    """The config of a model made from scratch."""
    backbone = config_from_options(o.backbone, vocabulary.size)
    read: Any = SHIFTS[o.logits]
    settings: dict[str, Any] = {"places": o.places, "positions": o.positions, "embed": o.embed, "gates": o.gates}
    settings |= {"alibi": o.alibi, "read": read, "adaln_start": o.adaln_start}
    config = MeDiMConfig(backbone.to_dict(), vocabulary.to_dict(), o.adaln_dim, **settings)
    config._attn_implementation = o.backbone.attn_implementation
    return config


def _slopes(config: MeDiMConfig, heads: int) -> list[float]:
    """The slope of each head, or none."""
    if config.alibi and (not config.places or math.isqrt(config.places) ** 2 != config.places):
        raise UserError(f"model.alibi needs the codes of a square image as model.places, not {config.places}")
    return [config.alibi[head % len(config.alibi)] for head in range(heads)] if config.alibi else []


class Scored(NamedTuple):
    """Rows whose cross-entropy is wanted: places in the flattened [B*Q], grouped by kind in the order of `KINDS`.

    Attributes:
        targets: their clean ids.
        sizes: how many rows each kind has.
    """

    rows: Int[Tensor, "N"]
    targets: Int[Tensor, "N"]
    sizes: tuple[int, ...]


class Pooled(NamedTuple):
    """Rows of one segment each, and which map their embeddings are made by: a kind, or ``invariant``."""

    canvas: Canvas
    name: str


class PlaceEmbedding(nn.Embedding):
    """Where in its image a code is; index 0 is nowhere. Zero at the start, where a pretrained model is unchanged."""

    @staticmethod
    def resized(table: Float[Tensor, "P D"], places: int) -> Float[Tensor, "R D"]:
        """The table for a square grid of so many places, interpolated as a ViT's is (arXiv 2010.11929, section 3.2)."""
        old, new = math.isqrt(len(table) - 1), math.isqrt(places)
        grid = table[1:].float().T.unflatten(1, (old, old)).unsqueeze(0)
        finer = nn.functional.interpolate(grid, (new, new), mode="bilinear", align_corners=False)
        return torch.cat([table[:1], finer[0].flatten(1).T.to(table)])


class Embedder(nn.Module):
    """Pooled states to embeddings: one map a kind for alignment (`info_nce`), one for invariance (`barlow_twins`).

    Attributes:
        log_scale: log of 1 / temperature, learnt.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        for name in (*KINDS, "invariant"):  # parameters of this very module: ZeRO-3 has them whole in its forward pass
            setattr(self, name, nn.Parameter(torch.empty(width, hidden_size)))
        self.log_scale = nn.Parameter(torch.full((1,), -math.log(TEMPERATURE)))  # ZeRO takes no scalars

    def forward(self, pooled: Float[Tensor, "B D"] | None = None, name: str = "") -> tuple[Tensor, Float[Tensor, ""]]:
        """Embeddings [B, E] (without `pooled`: 0) and the log of the scale. Every weight takes part, with a factor 0 if
        it is not asked for: DDP wants a gradient of each."""
        rest = 0 * torch.stack([weight.sum() for weight in self.parameters()]).sum()
        return (
            rest if pooled is None else nn.functional.linear(pooled, getattr(self, name)) + rest
        ), self.log_scale.squeeze(0) + rest


class TagEmbedding(nn.Embedding):
    """Which image a code belongs to, by its tags; index 0 is none. Zero at the start."""


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
    lora: Adapted | None = None  # what `medim.model.lora.add_lora` did to it
    codebook: Float[Tensor, "K E"] | None = None  # whose vectors freshly drawn rows of codes are to have

    def __init__(self, config: MeDiMConfig) -> None:
        super().__init__(config)
        inner = AutoConfig.for_model(**config.backbone)
        inner._attn_implementation = config._attn_implementation or "sdpa"
        self.vocabulary = Vocabulary.from_dict(config.vocabulary)
        self.backbone = make_backbone(inner)
        head = RestrictedHead.from_linear(self.backbone.get_output_embeddings())
        head.softcap = getattr(inner, "final_logit_softcapping", None)
        self.backbone.set_output_embeddings(head)
        self.window = window_of(inner)
        self.place: PlaceEmbedding | None = None
        self.set_places(config.places)
        tags = len(self.vocabulary.tags)
        self.embedder = Embedder(inner.hidden_size, config.embed) if config.embed else None
        self.gates = CrossGates(tags) if config.gates else None
        self.belongs = TagEmbedding(tags + 1, inner.hidden_size) if config.positions == "aligned" else None
        self.slopes = _slopes(config, inner.num_attention_heads)
        self.time = TimeEmbedding(config.adaln_dim, TimeOptions(**config.time))
        self.adaln = nn.ModuleList(
            AdaLN(config.adaln_dim, inner.hidden_size) for _ in range(len(decoder_layers(self.backbone)))
        )
        for adaln, layer in zip(self.adaln, decoder_layers(self.backbone), strict=True):
            assert isinstance(adaln, AdaLN)
            adaln.attach(layer)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, AdaLN):
            module.reset(self.config.adaln_start)
        elif isinstance(module, Embedder):
            for name, weight in module.named_parameters():
                if name == "log_scale":
                    nn.init.constant_(weight, -math.log(TEMPERATURE))
                else:
                    nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        elif isinstance(module, CrossGates | PlaceEmbedding | TagEmbedding):
            nn.init.zeros_(module.weight)
        elif isinstance(module, TimeEmbedding):
            for linear in module.linears:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    @classmethod
    def from_options(cls, o: ModelOptions, vocabulary: Vocabulary) -> MeDiMModel:
        """A model with fresh weights."""
        return cls(config_of(o, vocabulary))

    @classmethod
    def from_backbone(
        cls,
        source: str | Path | PreTrainedModel,
        vocabulary: Vocabulary,
        adaln_dim: int = 128,
        config: MeDiMConfig | None = None,
        **more: Any,
    ) -> MeDiMModel:
        """A pretrained language model with its weights, without its causal mask, with rows for codes and tags.

        Args:
            source: a folder or hub name that `AutoModelForCausalLM.from_pretrained` takes, or a loaded model, which is
                used up.
            config: of a model that was made so before; replaces `adaln_dim` and `more`.
            more: fields of `MeDiMConfig`.
        """
        pretrained: Any = source
        if isinstance(source, str | Path):
            pretrained = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        grow_vocabulary(pretrained, vocabulary.size)
        model = cls(config or MeDiMConfig(pretrained.config.to_dict(), vocabulary.to_dict(), adaln_dim, **more))
        state = pretrained.state_dict()
        known = model.backbone.state_dict().keys()
        model.backbone.load_state_dict({name: value for name, value in state.items() if name in known})
        return model

    @torch.no_grad()
    def drawn(self, unit: nn.Module, seed: int) -> None:
        """Change what was drawn for a unit: the rows of codes, if `codebook` says so."""
        tables = [self.backbone.get_input_embeddings(), self.backbone.get_output_embeddings()]
        for number, table in enumerate(tables):
            if self.codebook is not None and unit is table:
                weight: Any = table.weight
                start, stop = self.vocabulary.image
                generator = torch.Generator().manual_seed(2 * seed + number)
                weight[start:stop] = kernel_rows(weight[:start], self.codebook, generator).to(weight)

    def set_places(self, places: int) -> None:
        """A fresh table for images of so many codes, unless it has them already."""
        self.config.places = places
        if places and (self.place is None or self.place.num_embeddings != places + 1):
            self.place = PlaceEmbedding(places + 1, self.backbone.config.hidden_size)

    def fitted(self, name: str, value: Tensor) -> Tensor:
        """A stored tensor for this model: places of another square grid are interpolated."""
        places = len(value) - 1
        if name != "place.weight" or places == self.config.places or math.isqrt(places) ** 2 != places:
            return value
        return PlaceEmbedding.resized(value, self.config.places)

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that the weights were trained with."""
        return Schedule(self.config.schedule, self.config.schedule_power)

    @property
    def head(self) -> RestrictedHead | SplitHead:
        """The output matrix as a module: what is wanted of it, it computes inside its own forward pass."""
        return self.backbone.get_output_embeddings()

    @property
    def output_weight(self) -> Float[Tensor, "V D"]:
        """The output matrix, tied or not."""
        return self.head.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        ids: Int[Tensor, "B Q"],
        t: Float[Tensor, "B T"],
        level: Int[Tensor, "B Q"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "_ Q"] | None = None,
        place: Int[Tensor, "B Q"] | None = None,
        segment: Int[Tensor, "B Q"] | None = None,
        tags: Int[Tensor, "B S A"] | None = None,
        past_key_values: Cache | None = None,
        score: Scored | None = None,
        gated: Gated | None = None,
        alone: Sequence[Pooled] | None = None,
        **kernel: Any,
    ) -> Any:
        """Hidden states after the last norm, [B, Q, D]; `head` makes logits of them. With `score`, cross-entropies [N].
        With `alone`, a tuple of that, of embeddings, [M, E] each, and of the log of their scale.

        Args:
            t: noise levels in [0, 1], T a row.
            level: which of the T levels each position has; None: T = Q, each its own.
            attention_mask: bool [B, Q], False at padding, which no position attends to; or what
                `medim.model.attention` makes; None: all attend to all.
            position_ids: None: 0, 1, 2, ...; packed studies restart.
            place: number of a code within its image, from 1 (`Canvas.place`); left out, codes have no place.
            segment, tags: which segment a position is of, -1 none, and the numbers of its tags (`Canvas.tags`); only
                models with aligned positions look at them.
            past_key_values: keys and values of positions that are not among the Q.
            score: rows whose targets' cross-entropy in nats is wanted; the head then runs inside this pass, where
                ZeRO-3 and FSDP have its weight.
            gated: what `CrossGates` and `alibi` look at.
            alone: canvases of one segment a row whose embeddings are wanted, from passes of their own: together each
                segment would have seen the other.
            kernel: more arguments of the attention backend.

        Raises:
            UserError: the canvas is longer than the positions that the backbone knows, or the attention backend has no
                mask for what the backbone does.
        """
        hidden = self._hidden(
            ids, t, level, attention_mask, position_ids, place, segment, tags, past_key_values, gated, **kernel
        )
        if alone is not None:
            embedded, scales = zip(*(self._embedded(*one) for one in alone), strict=True)
            return self._scored(hidden, score) if score is not None else hidden.new_zeros(0), embedded, scales[0]
        if self.embedder is not None and self.training:
            hidden = hidden + self.embedder()[0]
        return hidden if score is None else self._scored(hidden, score)

    def _scored(self, hidden: Float[Tensor, "B Q D"], score: Scored) -> Float[Tensor, "N"]:
        """Cross-entropies of rows."""
        starts, stops = zip(*(self.vocabulary.columns(kind) for kind in KINDS), strict=True)
        rows = score.rows
        if self.config.read:
            parts = rows.split(score.sizes)
            rows = torch.cat([part + self.read_from(kind) for kind, part in zip(KINDS, parts, strict=True)])
        return self.head(hidden.flatten(0, 1)[rows], score.targets, starts, stops, score.sizes)

    def _hidden(
        self,
        ids: Int[Tensor, "B Q"],
        t: Float[Tensor, "B T"],
        level: Int[Tensor, "B Q"] | None = None,
        attention_mask: Any = None,
        position_ids: Int[Tensor, "_ Q"] | None = None,
        place: Int[Tensor, "B Q"] | None = None,
        segment: Int[Tensor, "B Q"] | None = None,
        tags: Int[Tensor, "B S A"] | None = None,
        past_key_values: Cache | None = None,
        gated: Gated | None = None,
        **kernel: Any,
    ) -> Float[Tensor, "B Q D"]:
        """States after the last norm; arguments as those of `forward`."""
        limit = getattr(self.backbone.config, "max_position_embeddings", None)
        if position_ids is None and limit is not None and ids.shape[1] > limit:
            raise UserError(f"a canvas of {ids.shape[1]} positions is longer than the backbone's {limit}")
        embedded = self.backbone.get_input_embeddings()(ids)
        length = ids.shape[1]
        if self.place is not None and place is not None:
            embedded = embedded + self.place(place.clamp(max=self.config.places))
        if self.belongs is not None and segment is not None and tags is not None:
            own = torch.nn.functional.pad(self._told(tags), (0, 0, 0, 1))  # segment -1 finds the last: nothing
            number = torch.where(segment < 0, tags.shape[1], segment)
            embedded = embedded + own.gather(1, number.unsqueeze(-1).expand_as(embedded))
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            attention_mask = key_mask(attention_mask, self.attention_backend, embedded.dtype, length)
        if self.config.unseen is not None:
            self._check_backend("an id that nobody attends to")
            seen = ids != self.config.unseen
            attention_mask = hidden_keys(attention_mask, seen, embedded.dtype, self.attention_backend)
        if self.config.time["shared"]:
            own = t if level is None else t.gather(1, level)
            t, level = own.amax(1, keepdim=True), torch.zeros_like(ids)
        if gated is not None:
            self._check_backend("gates and alibi")
            if self.gates is not None:
                attention_mask = added(self.gates(gated, embedded.dtype), attention_mask)
            if self.slopes:
                slopes = torch.tensor(self.slopes, dtype=embedded.dtype, device=ids.device)
                attention_mask = added(alibi(gated, slopes, math.isqrt(self.config.places)), attention_mask)
        return self.backbone.get_decoder()(
            inputs_embeds=embedded,
            attention_mask=self._windowed(attention_mask, length, ids.device),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=past_key_values is not None,
            is_causal=False,
            time=self.time(t),
            level=level,
            **kernel,
        ).last_hidden_state

    def read_from(self, kind: Kind) -> int:
        """How many positions after its own the prediction of a position is read; its row of the canvas has them."""
        return int(self.config.read.get(kind, 0))

    def _check_backend(self, what: str) -> None:
        if self.attention_backend not in ("sdpa", "eager"):
            raise UserError(f"attn_implementation: {self.attention_backend} has no mask for {what}; use sdpa")

    def is_windowed(self, length: int) -> bool:
        """Whether a canvas is longer than the window of some layers, which then do not see all of it."""
        return self.window is not None and length > self.window + 1

    def _windowed(self, mask: Any, length: int, device: torch.device) -> Any:
        """The attention mask for backbones with sliding-window layers: a mask for each kind of layer."""
        if self.window is None or mask is None or self.attention_backend == "flash_attention_2":
            return mask  # the library makes its own
        if self.is_windowed(length):
            self._check_backend("sliding windows on padded or packed canvases")
        near = within(mask, self.window, length, device) if self.is_windowed(length) else mask
        kinds = set(getattr(self.backbone.config, "layer_types", None) or ())
        return {"full_attention": mask, "sliding_attention": near} if kinds else near

    @property
    def attention_backend(self) -> str:
        """What computes attention: sdpa, eager, flash_attention_2 or flex_attention."""
        return str(self.backbone.config._attn_implementation)

    def _embedded(self, canvas: Canvas, name: str) -> tuple[Float[Tensor, "M E"], Float[Tensor, ""]]:
        """Embeddings of rows of one segment, not normalised, and the log of their scale: a map of the mean state of the
        segment, at t=0."""
        if self.embedder is None:
            raise UserError("this model has no embeddings: train one with model.embed and objective.align")
        level = torch.zeros_like(canvas.ids)
        t = torch.zeros(len(canvas.ids), 1, device=canvas.ids.device)
        told = self.attention(canvas) | self.gating(canvas, t.expand(canvas.ids.shape))
        hidden = self._hidden(canvas.ids, t, level, **told)
        here = (canvas.segment >= 0).unsqueeze(-1).to(hidden.dtype)
        return self.embedder((hidden * here).sum(1) / here.sum(1).clamp(min=1), name)

    def embed(self, canvas: Canvas, kind: Kind) -> Float[Tensor, "M E"]:
        """Embeddings of length 1 of rows that hold one image, or one report, each."""
        return torch.nn.functional.normalize(self._embedded(canvas, kind)[0].float(), dim=-1)

    def gating(self, canvas: Canvas, t: Float[Tensor, "B L"]) -> dict[str, Any]:
        """What gates and ALiBi look at on a whole canvas, as an argument of `forward`; nothing for a model without."""
        if self.gates is None and not self.slopes:
            return {}
        marks = Marks(CrossGates.kinds(canvas), canvas.segment, canvas.place, t)
        return {"gated": Gated(marks, marks)}

    def _told(self, tags: Int[Tensor, "B S A"]) -> Float[Tensor, "B S D"]:
        """Of each segment, the sum of its tags' vectors."""
        assert self.belongs is not None
        return (self.belongs(tags) * (tags > 0).unsqueeze(-1)).sum(2)

    def attention(self, canvas: Canvas, given: Bool[Tensor, "B L"] | None = None) -> dict[str, Any]:
        """The arguments of `forward` that a canvas asks for; `given` as in `attention_of`."""
        asked = attention_of(canvas, given, self.attention_backend, self.dtype)
        if self.config.positions == "aligned" and asked["attention_mask"] is None:
            # without a mask, positions that fall back look like packed studies to transformers
            asked["attention_mask"] = key_mask(canvas.valid, self.attention_backend, self.dtype, canvas.ids.shape[1])
        return asked | self.marks(canvas)

    def marks(self, canvas: Canvas) -> dict[str, Any]:
        """What `forward` is told of each position of a canvas, beside its id and its level."""
        if self.config.positions == "row":
            return {"place": canvas.place}
        return {"place": canvas.place, "position_ids": canvas.aligned, "segment": canvas.segment, "tags": canvas.tags}

    def recompute_blocks(self, every: int = 1) -> None:
        """Gradient checkpointing: of every `every`-th decoder layer only the input is kept for the backward pass."""
        self.activation_checkpointing_enable({"use_reentrant": False})
        for number, layer in enumerate(decoder_layers(self.backbone)):
            layer.gradient_checkpointing = number % every == 0  # type: ignore[assignment]

    def compile_blocks(self, **options: Any) -> None:
        """`torch.compile` each decoder layer with its AdaLN by itself: small graphs without breaks, fast to compile.

        Args:
            options: of `torch.compile`.
        """
        for layer in decoder_layers(self.backbone):
            layer.compile(**options)

    def denoiser(
        self, canvas: Canvas, generate: Bool[Tensor, "B L"], refresh: int = 1, cache: bool = True
    ) -> BoundDenoiser:
        """This model as the callable that samplers and bounds take, on one canvas: see `BoundDenoiser`."""
        return BoundDenoiser(self, canvas, generate, refresh, cache)
