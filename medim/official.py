"""Checkpoints of MeDiM's authors (github.com/UCSC-VLAA/MeDiM) as folders of ours that give the same logits.

Their network is Gemma's, as Liquid has it, with an AdaLN of its own in each layer. What differs from ours is told to
the same model class by its config:

- the time embedding takes sigma = -log(1 - (1 - 1e-3) t), one for the whole row, given parts included, through a
  sinusoid of 256 and an MLP that ends without SiLU (`TimeOptions`);
- a branch is multiplied by its gate; ours by 1 + gate: 1 is taken from the bias when the weights are converted;
- the canvas is ``<boi> codes <eoi> <s> Image Size: Width is W Height is H. <s> text <eos>`` (`Vocabulary.frames`);
- text is read one position early, image codes one late (`MeDiMConfig.read`);
- id 0 fills the text and nobody attends to it (`MeDiMConfig.unseen`).

Shape letters: V joint vocabulary, D hidden width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GemmaConfig

from medim.errors import UserError
from medim.model.adaln import TimeOptions
from medim.model.medim import MeDiMConfig, MeDiMModel
from medim.pipeline import MeDiM
from medim.sampling import Plan, Sampling
from medim.tokenization.image import VQTokenizer, read_checkpoint
from medim.tokenization.joint import JointTokenizer, SlotOptions
from medim.tokenization.text import TextTokenizer
from medim.vocabulary import Vocabulary

WORDS = ("<boi>", "<eoi>", "<eos>")  # added to Llama-2's tokens, in this order
SLOT = 255  # tokens of a report: their 256 but for <s>, which is given here
PADDING = 0  # the id that fills it
HEAD = 256  # Gemma's width of an attention head
FREQUENCIES = 256
DOMAINS = ("xray", "pathology")
_EMBEDDING, _TIME = "model.embed_tokens.weight", "model.time_embedder."


def import_official(
    checkpoint: str | Path,
    image: VQTokenizer,
    text_folder: str | Path,
    size: tuple[int, int] = (512, 512),
    backbone: str | Path | None = None,
) -> MeDiM:
    """Read one of the authors' checkpoints.

    Args:
        checkpoint: its ``model.safetensors``, the folder that holds it, or a pickled state dict, of which tensors only
            are read.
        text_folder: Llama-2's tokenizer.
        size: width and height in pixels that every canvas states; the authors stated those of each file.
        backbone: the ``config.json`` of the Liquid that it was trained from; left out, Gemma's own settings are taken.

    Raises:
        UserError: a file is missing or damaged, or the checkpoint is not of that structure, or of other tokenizers.
    """
    state, where = read_weights(checkpoint), str(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(str(text_folder)) if Path(text_folder).is_dir() else None
    if tokenizer is None:
        raise UserError(f"{text_folder}: no such text tokenizer folder; give that of Llama-2, such as Llama-2-7b-hf")
    joint = _joint(tokenizer, image, size)
    trunk = _trunk(state, where, backbone)
    if trunk.vocab_size != joint.vocabulary.size:
        raise UserError(
            f"{where}: has {trunk.vocab_size} rows; {joint.text.size} text tokens, [MASK] and {image.codebook_size} "
            f"image codes need {joint.vocabulary.size}: these are not the tokenizers that it was trained with"
        )
    width = trunk.hidden_size
    model = MeDiMModel(
        MeDiMConfig(
            trunk.to_dict(),
            joint.vocabulary.to_dict(),
            adaln_dim=width,
            read={"text": -1, "image": 1},
            time=asdict(TimeOptions(FREQUENCIES, "sigma", activated=False, shared=True)),
            unseen=PADDING,
        )
    )
    _fill(model, state, where)
    slots = {domain: {SLOT: 1} for domain in DOMAINS}
    sampling = Sampling(Plan("confidence", steps=128), Plan("confidence", steps=128, schedule="cosine"), "together")
    return MeDiM(model, joint, slots, sampling, Path(where).name)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file or of the folder that holds it, without prefixes of wrappers.

    Raises:
        UserError: there is none, it is damaged, or it is an average without names.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint; give model.safetensors or the folder that holds it")
    if file.suffix == ".safetensors":
        try:
            state = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: damaged or cut short ({' '.join(str(error).split())[:200]})") from error
    else:
        state = read_checkpoint(file)
    for prefix in ("module.", "backbone."):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def convert_weights(folder: str | Path, out: str | Path) -> list[str]:
    """Copy a HuggingFace folder, its pickled weights as safetensors; tensors only are read, no foreign code runs.

    Returns the names of the files that were converted.

    Raises:
        UserError: no pickled weights there, or they cannot be read.
    """
    folder, out = Path(folder), Path(out)
    files = sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if not files:
        raise UserError(f"{folder}: no pickled weights (pytorch_model*.bin) in it")
    states = [read_checkpoint(file) for file in files]
    out.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    size = 0
    for number, state in enumerate(states, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # tensors that share memory are copied apart: a tie is made again on loading
        save_file({key: value.clone().contiguous() for key, value in state.items()}, out / name, {"format": "pt"})
        index |= dict.fromkeys(state, name)
        size += sum(value.numel() * value.element_size() for value in state.values())
    if len(files) > 1:
        said = {"metadata": {"total_size": size}, "weight_map": index}
        (out / "model.safetensors.index.json").write_text(json.dumps(said, indent=1) + "\n")
    for file in folder.iterdir():
        if file.is_file() and file.suffix in (".json", ".model", ".txt", ".jinja") and "index" not in file.name:
            (out / file.name).write_bytes(file.read_bytes())
    return [file.name for file in files]


def _joint(tokenizer: Any, image: VQTokenizer, size: tuple[int, int]) -> JointTokenizer:
    """Their ids: text, the three words, [MASK], codes."""
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": list(WORDS)})
    if len(tokenizer) != known + len(WORDS) and known != max(tokenizer.convert_tokens_to_ids(list(WORDS))) + 1:
        raise UserError("the text tokenizer has some of <boi>, <eoi>, <eos> already: give Llama-2's own")
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(PADDING)  # what fills a report is what ends it
    text = TextTokenizer(tokenizer)
    begin, end, last = tokenizer.convert_tokens_to_ids(list(WORDS))
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    said = [*start, *text.encode(f"Image Size: Width is {size[0]} Height is {size[1]}."), *start]
    first = text.size + 1
    return JointTokenizer(
        text,
        image,
        Vocabulary(
            (0, text.size),
            (first, first + image.codebook_size),
            text.eos,
            {"mask": text.size},
            {"image": ((begin,), (end,)), "report": (tuple(said), (last,))},
        ),
        SlotOptions(SLOT, SLOT),
    )


def _trunk(state: Mapping[str, Tensor], where: str, backbone: str | Path | None) -> GemmaConfig:
    """The config of Gemma's part, from the shapes."""
    layers = {int(name.split(".")[2]) for name in state if name.startswith("model.layers.")}
    wanted = [_EMBEDDING, "model.norm.weight", f"{_TIME}mlp.0.weight", "model.layers.0.adaLN_modulation.weight"]
    missing = [name for name in wanted if name not in state]
    if missing or layers != set(range(len(layers))):
        raise UserError(
            f"{where}: not a checkpoint of the authors' MeDiM: "
            + (f"{missing[0]} is missing" if missing else "layers are")
        )
    rows, width = state[_EMBEDDING].shape
    queries, keys = (len(state[f"model.layers.0.self_attn.{name}_proj.weight"]) for name in "qk")
    given: dict[str, Any] = {}
    if backbone is not None:
        try:
            given = json.loads(Path(backbone).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{backbone}: not the config.json of a backbone ({error})") from error
    head = int(given.get("head_dim", HEAD))
    if queries % head or keys % head:
        raise UserError(
            f"{where}: {queries} query and {keys} key channels are not heads of {head}: give the backbone's "
            "config.json (--backbone-config)"
        )
    return GemmaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=len(state["model.layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=len(layers),
        num_attention_heads=queries // head,
        num_key_value_heads=keys // head,
        head_dim=head,
        hidden_act=given.get("hidden_activation") or "gelu_pytorch_tanh",
        max_position_embeddings=int(given.get("max_position_embeddings", 8192)),
        rms_norm_eps=float(given.get("rms_norm_eps", 1e-6)),
        rope_parameters={"rope_type": "default", "rope_theta": float(given.get("rope_theta", 10_000.0))},
        tie_word_embeddings="lm_head.weight" not in state or torch.equal(state["lm_head.weight"], state[_EMBEDDING]),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _fill(model: MeDiMModel, state: Mapping[str, Tensor], where: str) -> None:
    """Weights under our names, the gates counted from 1."""
    width, found = model.backbone.config.hidden_size, {}
    for name, value in state.items():
        value = value.float()
        if name.startswith(_TIME):
            found[f"time.{name.removeprefix(_TIME)}"] = value
        elif ".adaLN_modulation." in name:
            layer, _, part = name.removeprefix("model.layers.").partition(".adaLN_modulation.")
            if part == "bias":
                value = value.clone()
                for gate in (2, 5):  # of shift, scale, gate, twice
                    value[gate * width : (gate + 1) * width] -= 1
            found[f"adaln.{layer}.linear.{part}"] = value
        elif not name.endswith("rotary_emb.inv_freq"):
            found[f"backbone.{name}"] = value
    if model.backbone.config.tie_word_embeddings:
        found["backbone.lm_head.weight"] = found[f"backbone.{_EMBEDDING}"]
    wanted = model.state_dict()
    differ = sorted(wanted.keys() ^ found.keys())
    if differ:
        verb = "is missing" if differ[0] in wanted else "is unknown"
        raise UserError(f"{where}: not a checkpoint of the authors' MeDiM: {differ[0]} {verb}")
    for name, value in found.items():
        if value.shape != wanted[name].shape:
            raise UserError(f"{where}: {name} is {list(value.shape)}, wanted {list(wanted[name].shape)}")
    model.load_state_dict(found)
