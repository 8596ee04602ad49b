"""Studies -> tokenised dataset: images are encoded once and stored as integers, in shards that survive a kill."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Sequence, Value, concatenate_datasets, load_from_disk
from datasets.utils.logging import disable_progress_bar
from tqdm import tqdm

from medim.data.studies import Study
from medim.errors import UserError
from medim.tokenization.image import VQTokenizer, prepare_image
from medim.vocabulary import MODALITIES

ENCODE_BATCH = 32
FEATURES = Features(
    {
        "id": Value("string"),
        "modality": Value("string"),
        "codes": Sequence(Value("uint16")),
        "report": Value("string"),
        "split": Value("string"),
    }
)


def codebook_hash(tokenizer: VQTokenizer) -> str:
    """Names the tokenizer that a dataset's codes belong to: the sha256 of all its weights, 16 hex digits."""
    digest = hashlib.sha256()
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def prepare(
    studies_from: Callable[[int], Iterable[Study]],
    tokenizer: VQTokenizer,
    out: str | Path,
    *,
    total: int,
    shard_size: int = 5000,
) -> Dataset:
    """Encode every study's first image and write shards of `shard_size` studies under `out`.

    Args:
        studies_from: the studies from a number on, up to `total`; asked for the first shard that is not there.

    A shard is written aside and renamed, so a killed run leaves whole shards only and the next one goes on after them.

    Raises:
        UserError: `out` holds a dataset of another image tokenizer.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tag = {"image_tokenizer": codebook_hash(tokenizer), "studies": total, "shard_size": shard_size}
    card = out / "dataset.json"
    if card.is_file():
        _check_card(json.loads(card.read_text()), tag, out)
    else:
        aside = card.with_suffix(".partial")
        aside.write_text(json.dumps(tag) + "\n")
        os.replace(aside, card)
    disable_progress_bar()
    starts = range(0, total, shard_size)
    missing = [n for n in range(len(starts)) if not (out / f"shard-{n:05d}").is_dir()]
    if not missing:
        return load(out)
    remaining = iter(studies_from(starts[missing[0]]))
    bar = tqdm(total=total, initial=starts[missing[0]], desc="encoding studies", unit="study", mininterval=1)
    for number in range(missing[0], len(starts)):
        folder = out / f"shard-{number:05d}"
        part = itertools.islice(remaining, min(shard_size, total - starts[number]))
        if number in missing:
            _write_shard(part, tokenizer, folder, bar)
        else:
            bar.update(sum(1 for _ in part))
    bar.close()
    return load(out)


def _write_shard(part: Iterable[Study], tokenizer: VQTokenizer, folder: Path, bar: tqdm) -> None:
    records = list(_encode(part, tokenizer, bar))
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    Dataset.from_list(records, features=FEATURES).save_to_disk(str(aside))
    os.replace(aside, folder)


def _encode(studies: Iterable[Study], tokenizer: VQTokenizer, bar: tqdm) -> Iterator[dict[str, object]]:
    for batch in _batched(studies):
        pixels = [
            prepare_image(s.images[0].pixels, tokenizer.config.resolution, MODALITIES[s.images[0].modality].gray)
            for s in batch
        ]
        for study, codes in zip(batch, tokenizer.encode(pixels), strict=True):
            yield {
                "id": study.id,
                "modality": study.images[0].modality,
                "codes": np.asarray(codes, dtype=np.uint16).ravel(),
                "report": study.report,
                "split": study.split,
            }
        bar.update(len(batch))


def _batched(studies: Iterable[Study]) -> Iterator[tuple[Study, ...]]:
    rest = iter(studies)
    while batch := tuple(itertools.islice(rest, ENCODE_BATCH)):
        yield batch


def _check_card(found: dict[str, object], wanted: dict[str, object], out: Path) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{out}: holds a dataset with {key}={found.get(key)}, wanted {value}; give another folder or remove it"
            )


def load(folder: str | Path, tokenizer: VQTokenizer | None = None) -> Dataset:
    """Open a prepared dataset, memory-mapped; with `tokenizer`, check that the codes are its own.

    Raises:
        UserError: nothing prepared there, shards missing, or codes of another tokenizer.
    """
    folder = Path(folder)
    shards = sorted(p for p in folder.glob("shard-*") if p.is_dir())
    if not shards or not (folder / "dataset.json").is_file():
        raise UserError(
            f"{folder}: no prepared dataset there; make one with `medim prepare SOURCE ROOT --out {folder}`"
        )
    card = json.loads((folder / "dataset.json").read_text())
    if tokenizer is not None:
        _check_card(card, {"image_tokenizer": codebook_hash(tokenizer)}, folder)
    data = concatenate_datasets([load_from_disk(str(shard)) for shard in shards])
    if len(data) != card["studies"]:
        raise UserError(f"{folder}: holds {len(data)} of {card['studies']} studies; run the command that made it again")
    return data
