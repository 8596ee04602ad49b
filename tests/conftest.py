"""Small things that many tests share: an exact toy denoiser, a tiny network, a saved tiny model folder."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before HuggingFace's packages read it

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_accelerator() -> Iterator[None]:
    """Each test trains as if it were alone: accelerate keeps the precision of the first run of a process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


class Toy:
    """A random joint distribution p of `length` positions with `values` values, and its exact posterior as a denoiser.

    Attributes:
        mask_id: ``values`` (then V = values: [MASK] has no column) or smaller (then V = values + 1, and the column of
            [MASK] holds the largest logit).
        ids: the ids that each position can hold; several modalities have disjoint ranges. Replaces length and values.
        states: every clean row, ids [S, L]; `p` [S] are their probabilities.
        seen: (ids, t) of every call.
    """

    def __init__(
        self,
        length: int = 3,
        values: int = 4,
        mask_id: int = 4,
        seed: int = 0,
        sharpness: float = 1.0,
        ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.mask_id = mask_id
        self.ids = ids or [[i for i in range(values + 1) if i != mask_id][:values]] * length
        self.states = torch.cartesian_prod(*map(torch.tensor, self.ids)).view(-1, len(self.ids))
        self.p = torch.softmax(
            sharpness * torch.randn(len(self.states), generator=torch.Generator().manual_seed(seed)), 0
        )
        self.columns = max(map(max, self.ids)) + 1
        self.seen: list[tuple[Tensor, Tensor]] = []
        # the marginals of every partly masked row are looked up: its number has a digit a position
        digits = [[*possible, mask_id] for possible in self.ids]
        partial = torch.cartesian_prod(*map(torch.tensor, digits)).view(-1, len(digits))
        self.table = self.marginals(partial)
        self.digit = torch.zeros(len(digits), max(self.columns, mask_id + 1), dtype=torch.long)
        unit = len(partial)
        for place, possible in enumerate(digits):
            unit //= len(possible)
            self.digit[place, possible] = torch.arange(len(possible)) * unit

    def groups(self, generate: Tensor) -> list[Any]:
        """Positions that can hold the same ids, modality by modality."""
        from medim.diffusion import Group

        groups = []
        for possible in dict.fromkeys(map(tuple, self.ids)):
            here = torch.tensor([tuple(own) == possible for own in self.ids])
            groups.append(Group((generate & here).flatten().nonzero().squeeze(1), min(possible), max(possible) + 1))
        return groups

    def marginals(self, ids: Tensor) -> Tensor:
        """p(x_i = v | what is not [MASK] in ids), [B, L, V]."""
        agrees = ((ids.unsqueeze(1) == self.mask_id) | (ids.unsqueeze(1) == self.states)).all(-1)
        one_hot = torch.nn.functional.one_hot(self.states, self.columns).float()
        mass = torch.einsum("bs,s,slv->blv", agrees.float(), self.p, one_hot)
        return mass / mass.sum(-1, keepdim=True)

    def __call__(self, ids: Tensor, t: Tensor) -> Tensor:
        self.seen.append((ids.clone(), t.clone()))
        logits = self.table[self.digit[torch.arange(ids.shape[1]), ids].sum(1)].log()
        if self.mask_id < self.columns:
            logits[..., self.mask_id] = 9.0
        return logits

    def conditional(self, given: Tensor) -> Tensor:
        """p(state | what is not [MASK] in the row `given`), [S]."""
        mass = self.p * ((given == self.mask_id) | (given == self.states)).all(-1)
        return mass / mass.sum()

    def count(self, ids: Tensor) -> np.ndarray:
        """How often each state occurs in rows of ids; every row must be a state."""
        where = (ids.unsqueeze(1) == self.states).all(-1)
        assert bool(where.any(1).all())
        return where.sum(0).numpy()


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """Makes toys: toy(length, values, mask_id, seed, sharpness, ids)."""
    return Toy


@pytest.fixture(scope="session")
def vocabulary() -> Any:
    """12 text ids, 8 codes, tags."""
    from medim.vocabulary import Vocabulary

    return Vocabulary.build(text_size=12, eos=0, codebook_size=8, views=())


def randomise(model: Any) -> Any:
    """Make a fresh network depend visibly on the noise level and on its input."""
    with torch.no_grad():
        for adaln in model.adaln:
            adaln.linear.weight.normal_(std=0.3)
        model.output_weight.normal_(std=0.4)
    return model.eval()


@pytest.fixture
def tiny_network(vocabulary: Any) -> Any:
    """A two-layer network on `vocabulary`, AdaLN not zero."""
    from medim.model.backbone import BackboneOptions
    from medim.model.medim import MeDiMModel, ModelOptions

    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    options = ModelOptions(backbone=BackboneOptions(**shape, intermediate_size=48), adaln_dim=16)
    return randomise(MeDiMModel.from_options(options, vocabulary))


@pytest.fixture(scope="session")
def make_rows(vocabulary: Any) -> Callable[[Sequence[int]], list[Any]]:
    """Makes rows of an image of 6 codes and a report of each given length, ids drawn at random."""
    from medim.canvas import Segment, layout

    def make(lengths: Sequence[int]) -> list[Any]:
        rng = np.random.default_rng(0)
        first = vocabulary.image[0]
        rows = []
        for length in lengths:
            codes = Segment("image", "xray", (first + rng.integers(0, 8, 6)).tolist())
            report = Segment("report", "text", rng.integers(0, 12, length).tolist())
            rows.append(layout([codes, report], vocabulary))
        return rows

    return make


@pytest.fixture(scope="session")
def tiny_joint() -> Any:
    """The shipped text tokenizer and a VQ tokenizer of 16 codes on a 6 x 6 grid, weights random."""
    from medim.tokenization.image import VQConfig, VQTokenizer
    from medim.tokenization.joint import JointTokenizer, SlotOptions
    from medim.tokenization.text import TextTokenizer

    torch.manual_seed(0)
    config = VQConfig(resolution=96, ch=32, ch_mult=(1, 1, 1), z_channels=8, embed_dim=4, n_embed=16, patch=4)
    image = VQTokenizer(config).eval()
    with torch.no_grad():
        image.quantize.embedding.weight.normal_(std=0.3)
    text = TextTokenizer.from_pretrained(ROOT / "tokenizers" / "demo-bpe")
    return JointTokenizer.build(text, image, SlotOptions(multiple=16, longest=48), views=())


@pytest.fixture(scope="session")
def tiny_model(tiny_joint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model folder with random weights, for X-rays and pathology."""
    from medim.model.backbone import BackboneOptions
    from medim.model.medim import MeDiMModel, ModelOptions
    from medim.pipeline import MeDiM
    from medim.sampling import Sampling

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    options = ModelOptions(backbone=BackboneOptions(**shape, intermediate_size=48), adaln_dim=16)
    network = randomise(MeDiMModel.from_options(options, tiny_joint.vocabulary))
    slots = {"xray": {16: 2, 32: 1, 48: 1}, "pathology": {16: 1}}
    folder = tmp_path_factory.mktemp("models") / "tiny"
    MeDiM(network, tiny_joint, slots, Sampling(), "tiny").save_pretrained(folder)
    return folder
