"""A training run from its config: everything a config can say, and how the parts it names are put together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import PIL.Image
from pydantic import Field

from medim.config import options
from medim.data import embedded, prepare
from medim.data.order import Order, shares
from medim.data.phantom import Outlines
from medim.data.sources import demo
from medim.data.sources.base import provenance
from medim.diffusion import Schedule
from medim.errors import UserError
from medim.gallery import contact_sheet
from medim.model.adapters import fingerprint, is_adapters, read_settings
from medim.model.lora import LoraOptions, add_lora, import_bitsandbytes
from medim.model.medim import MeDiMConfig, MeDiMModel, ModelOptions, config_of
from medim.objective import ObjectiveOptions
from medim.pipeline import MeDiM, read_sampling, resolve, save_parts
from medim.sampling import Sampling
from medim.tokenization.image import VQTokenizer
from medim.tokenization.joint import JointTokenizer, SlotOptions
from medim.tokenization.text import TextTokenizer
from medim.training.checkpoint import Averaged
from medim.training.folders import STATE_NAME
from medim.training.loop import TrainOptions
from medim.training.report import LogOptions
from medim.training.sizes import EstimateOptions
from medim.training.task import DiffusionTask, Rows, Shown, Slots, Stage
from medim.training.validation import Validation, ValidationOptions
from medim.training.weights import Source, Stored, skeleton
from medim.vocabulary import MODALITIES, all_views


@options
class DataOptions:
    """Prepared datasets; the embedded one is made on first use.

    Attributes:
        path: folder of `medim prepare`, or several: a mixture.
        weights: of the datasets of a mixture; none: by their sizes and `temperature`.
        temperature: 1 draws every study equally often, a higher one small datasets more often.
        images: images of a study on one canvas, at most; of more, others in each epoch.
        absent: probability that an image, or the report, is left off the canvas: teaches to make one from any subset of
            the others.
        untold: probability that a word of the views that does not tell a study's images apart is left untold.
        studies: when `path` is missing, so many embedded studies are encoded there; 0 says that it must exist.
        pack: positions of a row that several studies share without seeing each other; 0 pads one study a row.
        lungs: outlines of the embedded X-rays; `real` ones come with an installed torchxrayvision.
        xrays_in_ten: how many of ten embedded studies are X-rays.
        domain: the image modality of reports without an image (for the lengths of their slots); empty: none.
    """

    path: str | tuple[str, ...]
    weights: tuple[float, ...] = ()
    temperature: Annotated[float, Field(gt=0)] = 1.0
    images: Annotated[int, Field(ge=1)] = 1
    absent: Annotated[float, Field(ge=0, lt=1)] = 0.0
    untold: Annotated[float, Field(ge=0, le=1)] = 0.1
    studies: Annotated[int, Field(ge=0)] = 0
    lungs: Outlines = "ellipse"
    xrays_in_ten: demo.XRaysInTen = embedded.XRAYS_IN_TEN
    pack: Annotated[int, Field(ge=0)] = 0
    domain: str = ""

    @property
    def shown(self) -> Shown:
        """What of a study is on its canvas."""
        return Shown(self.images, self.absent, self.untold, self.domain)


@options
class StageOptions:
    """A part of a run in which only some of the data are shown (multi-flow training, MedM2G section 3.4).

    Attributes:
        until: where it ends, as a share of the run.
        show: words of what is shown of a study: text, modalities, words of views. None: all. A study that has none of
            it is shown whole.
        weights: of the datasets of a mixture, in this stage; 0 leaves one out. None: as in `data`.
    """

    until: Annotated[float, Field(gt=0, le=1)]
    show: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


@options
class TrainConfig:
    """A run.

    Attributes:
        run_dir: holds the config, `metrics.jsonl`, checkpoints and the final model.
        init: a model folder (or `demo`) or a checkpoint to go on from, with its tokenizers; empty: a new model from
            `model`.
        seed: of the weights, the data order, the noise levels and the masks.
        resolution: side in pixels to which images are prepared, as in `medim prepare --resolution`; 0: as the image
            tokenizer has it. A model that was trained at another one goes on: its places are interpolated.
        lora: adapters over `init` instead of all its weights; the run's models are then folders of adapters.
        stages: in their order; none: all data from the first step on. After the last one all data are shown.
        estimate: sizes for `medim estimate` where tokenizers and data are elsewhere; training does not read it.
    """

    run_dir: str
    data: DataOptions
    init: str | None = ""
    seed: int = 0
    text_tokenizer: str = "tokenizers/demo-bpe"
    image_tokenizer: str = "tokenizers/demo-vq"
    resolution: Annotated[int, Field(ge=0)] = 0
    slot: SlotOptions = SlotOptions()
    model: ModelOptions = ModelOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    stages: tuple[StageOptions, ...] = ()
    train: TrainOptions = TrainOptions()
    lora: LoraOptions = LoraOptions()
    log: LogOptions = LogOptions()
    validation: ValidationOptions = ValidationOptions()
    estimate: EstimateOptions = EstimateOptions()


def make_task(config: TrainConfig) -> DiffusionTask:
    """Load or make everything that a config names.

    Raises:
        UserError: a tokenizer, a dataset or a checkpoint is missing, or they do not belong together.
    """
    if config.lora.rank and config.lora.bits:
        import_bitsandbytes(config.lora.bits)  # before any work; an estimate needs none
    stored, joint, sampling, shape = _start(config)
    shape._attn_implementation = config.model.backbone.attn_implementation
    with skeleton():
        model = MeDiMModel(shape)
    model.tie_weights()  # parameters that were made without memory are no longer one
    if model.vocabulary != joint.vocabulary:
        raise UserError(f"{config.init}: config.json and canvas.json disagree about the vocabulary; it was mixed up")
    if (config.objective.align or config.objective.invariance) and not shape.embed:
        raise UserError("objective.align and objective.invariance need embeddings: set model.embed, such as to 128")
    wanted = Schedule(config.objective.schedule, config.objective.schedule_power)
    if model.schedule != wanted:
        raise UserError(f"objective.schedule: {wanted} is asked for, {config.init} was trained with {model.schedule}")
    attention = config.objective.condition_attention
    if config.init and model.config.condition_attention != attention:
        print(
            f"note: {config.init} was trained with condition_attention: {model.config.condition_attention}, "
            f"this run goes on with {attention} (objective.condition_attention)",
            file=sys.stderr,
        )
    model.config.condition_dropout, model.config.condition_attention = config.objective.condition_dropout, attention
    model.config.absent = config.data.absent
    if config.model.rows == "codebook" and stored is None:
        model.codebook = joint.image.codebook.detach()
    if config.lora.rank:
        add_lora(model, config.lora, config.seed, config.init or "", _adapted_base(config.init or ""))
    write = partial(save_parts, joint=joint, sampling=sampling)
    folders = [config.data.path] if isinstance(config.data.path, str) else config.data.path
    if config.data.studies:
        _embed(config, joint, Path(folders[0]), config.data.studies, "train")
    data = [prepare.load(folder, joint.image, split="train") for folder in folders]
    sizes = [len(one) for one in data]
    order = Order(config.seed, tuple(sizes), shares(sizes, config.data.temperature, config.data.weights))
    fits = all(prepare.read_index(folder)["text_tokenizer"] == prepare.text_hash(joint.text) for folder in folders)
    if config.data.domain and config.data.domain not in MODALITIES:
        raise UserError(f"data.domain={config.data.domain}: no image modality; one of {', '.join(MODALITIES)}")
    rows = Rows(joint, data, config.data.shown, fits)
    return DiffusionTask(
        model,
        rows,
        order,
        config.objective,
        config.train.batch_size,
        config.seed,
        write,
        config.data.pack,
        stored,
        _validation(config, joint, folders) if config.validation.every else None,
        partial(_draw, joint=joint, sampling=sampling) if config.log.pictures else None,
        _stages(config, sizes, order),
    )


def _start(config: TrainConfig) -> tuple[Source | None, JointTokenizer, Sampling, MeDiMConfig]:
    """What a run begins with: stored weights if it goes on from a model, the tokenizers, the plans, the shape.

    Raises:
        UserError: a model or a tokenizer is missing, or is adapters, or takes no images of `config.resolution`.
    """
    stored: Source | None = None
    if config.init:
        is_checkpoint = (Path(config.init) / STATE_NAME).is_file()  # a model folder whose weights are in pieces
        folder = Path(config.init) / "model" if is_checkpoint else resolve(config.init)
        if is_adapters(folder):
            raise UserError(
                f"init={config.init}: adapters over {read_settings(folder).base}; merge them: medim merge "
                f"{config.init} --out DIR"
            )
        stored = Averaged(Path(config.init)) if is_checkpoint else Stored(folder)
        joint, sampling = JointTokenizer.from_pretrained(folder), read_sampling(folder)
        shape = MeDiMConfig.from_pretrained(folder)
    else:
        text = TextTokenizer.from_pretrained(config.text_tokenizer)
        joint = JointTokenizer.build(text, VQTokenizer.from_pretrained(config.image_tokenizer), config.slot)
        shape, sampling = config_of(config.model, joint.vocabulary), Sampling()
        shape.schedule, shape.schedule_power = config.objective.schedule, config.objective.schedule_power
    if config.resolution:
        joint.image.prepare_at(config.resolution)
        shape.places = joint.codes if stored is not None and shape.places else shape.places
    return stored, joint, sampling, shape


def _stages(config: TrainConfig, sizes: Sequence[int], order: Order) -> tuple[Stage, ...]:
    """The stages of a run.

    Raises:
        UserError: they do not follow each other, or say what no data have.
    """
    known = {"text", *MODALITIES, *all_views()}
    made: list[Stage] = []
    for number, one in enumerate(config.stages):
        where, until = f"stages.{number}", round(one.until * config.train.steps)
        if until <= (made[-1].until if made else 0):
            raise UserError(f"{where}.until={one.until:g}: ends no later than the stage before it")
        unknown = [word for word in one.show if word not in known]
        if unknown:
            raise UserError(f"{where}.show: unknown {unknown[0]!r}; one of {', '.join(sorted(known))}")
        if one.weights and (len(one.weights) != len(sizes) or min(one.weights) < 0 or not sum(one.weights)):
            raise UserError(f"{where}.weights: one number from 0 on for each of the {len(sizes)} datasets, one above 0")
        parts = tuple(weight / sum(one.weights) for weight in one.weights)
        made.append(Stage(until, one.show, replace(order, shares=parts) if parts else order))
    return tuple(made)


def _validation(config: TrainConfig, joint: JointTokenizer, folders: Sequence[str]) -> Validation:
    """The fixed set: the first studies of the split `validation` of each dataset.

    Raises:
        UserError: a dataset has no such split.
    """
    o = config.validation
    if config.data.studies:
        folders = [f"{folders[0]}-validation"]
        _embed(config, joint, Path(folders[0]), o.studies, "validation")
    records, rows = [], []
    for folder in folders:
        data = prepare.load(folder, joint.image, split="validation")
        data = data.select(range(min(o.studies, len(data))))
        source = Rows(joint, [data], config.data.shown)
        rows += [source.row(0, index) for index in range(len(data))]
        records += list(data)
    modalities = [str(record["images"][0]["modality"]) if record["images"] else "text" for record in records]
    return Validation(rows, modalities, o, config.objective, joint.vocabulary.eos, joint.vocabulary.mask)


def _draw(model: MeDiMModel, slots: Slots, *, joint: JointTokenizer, sampling: Sampling) -> PIL.Image.Image:
    """Four pairs of each domain, always of the same noise."""
    training = model.training
    whole = MeDiM(model, joint, slots, sampling, "training")
    samples = [one for domain in whole.domains for one in whole.sample("pair", domain, n=4, seed=0)]
    model.train(training)
    return contact_sheet(samples)


def _adapted_base(init: str) -> str:
    """The fingerprint of the model that adapters are trained over."""
    if not init or (Path(init) / STATE_NAME).is_file():
        raise UserError("lora.rank: adapters are trained over a model folder: set init to one (medim export), or demo")
    return fingerprint(resolve(init))


def _embed(
    config: TrainConfig, joint: JointTokenizer, folder: Path, count: int, split: Literal["train", "validation"]
) -> None:
    """Prepare so many embedded studies in `folder`, or check that they are there."""
    side = embedded.side_for(joint.image.config.resolution)
    choice = demo.DemoOptions(count, split, config.seed, config.data.lungs, config.data.xrays_in_ten, side)
    how = prepare.Encoding(joint.image, joint.text)
    prepare.prepare(
        lambda: demo.read(Path(), choice),
        how,
        folder,
        source="demo",
        options=provenance(choice, how.reports),
        total=count,
    )
