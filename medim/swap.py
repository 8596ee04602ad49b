"""Another image tokenizer for a trained model, so that its layers need not be trained again.

Shape letters: K new codes, J old codes, H W pixels, D model width, V W ids of the old and the new vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from medim.errors import UserError
from medim.model.medim import MeDiMConfig, MeDiMModel
from medim.pipeline import MeDiM
from medim.tokenization.image import VQTokenizer
from medim.tokenization.joint import JointTokenizer
from medim.vocabulary import Vocabulary


@torch.no_grad()
def shared_places(
    old: VQTokenizer, new: VQTokenizer, batches: Iterable[Float[Tensor, "_ 3 H W"]]
) -> Float[Tensor, "K J"]:
    """How often each new code lies where each old one does, over pictures in [-1, 1].

    Raises:
        UserError: the tokenizers prepare pictures of another size, or their grids differ.
    """
    a, b = (one.config for one in (old, new))
    if (a.resolution, a.downsampling) != (b.resolution, b.downsampling):
        raise UserError(
            f"the model's tokenizer has {a.resolution} px, f={a.downsampling}, the new one {b.resolution} px, "
            f"f={b.downsampling}: codes can be carried over only where the grids are the same"
        )
    counts = torch.zeros(new.codebook_size * old.codebook_size)
    for pixels in batches:
        pairs = new.encode(pixels).flatten().cpu() * old.codebook_size + old.encode(pixels).flatten().cpu()
        counts += torch.bincount(pairs, minlength=len(counts))
    return counts.view(new.codebook_size, old.codebook_size)


def swap_image_tokenizer(model: MeDiM, image: VQTokenizer, counts: Float[Tensor, "K J"]) -> MeDiM:
    """The model with another image tokenizer: a new code's rows are the mean of the old codes' rows by their share of
    its places, one that never occurred gets the mean by overall use. It must be trained further.

    Args:
        counts: of `shared_places`.

    Raises:
        UserError: the codes' rows are not behind those of the text.
    """
    kept = model.joint.vocabulary
    if kept.image[0] < kept.text[1] or kept.image[1] > min(kept.tags.values()) or kept.frames:
        raise UserError(
            f"{model.name}: its image codes are rows of the backbone's own, or framed as a foreign checkpoint does: "
            "keep its image tokenizer"
        )
    shares = counts + 1e-6 * counts.sum(0)  # codes that never occurred
    shares = shares / shares.sum(1, keepdim=True)
    old = model.joint
    joint = JointTokenizer.build(old.text, image, old.slot, rows=old.vocabulary.image[0], views=old.vocabulary.views)
    state = {name: _rows(value, old.vocabulary, joint.vocabulary, shares) if name in _tables(model.model) else value
             for name, value in model.model.state_dict().items()}  # fmt: skip
    settings = model.model.config.to_dict() | {"vocabulary": joint.vocabulary.to_dict()}
    settings["backbone"] = {**settings["backbone"], "vocab_size": joint.vocabulary.size}
    swapped = MeDiMModel(MeDiMConfig(**settings))
    swapped.load_state_dict(state)
    return MeDiM(swapped, joint, model.slots, model.sampling, model.name, model.views)


def _tables(model: MeDiMModel) -> set[str]:
    """Names of the weights that have a row for each id."""
    tables = (model.get_input_embeddings().weight, model.output_weight)
    return {name for name, value in model.state_dict(keep_vars=True).items() if any(value is one for one in tables)}


def _rows(
    table: Float[Tensor, "V D"], old: Vocabulary, new: Vocabulary, shares: Float[Tensor, "K J"]
) -> Float[Tensor, "W D"]:
    made = table.new_zeros(new.size, table.shape[1])
    kept: Int[Tensor, "I"] = torch.arange(old.image[0])
    made[kept] = table[kept]
    made[slice(*new.image)] = (shares @ table[slice(*old.image)].float()).to(table.dtype)
    for name, id in new.tags.items():
        if name in old.tags:
            made[id] = table[old.tags[name]]
    return made
