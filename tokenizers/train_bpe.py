"""Train a byte-level BPE text tokenizer on report text.

    python tokenizers/train_bpe.py --out tokenizers/demo-bpe                        # the shipped one, 20 s on a CPU
    python tokenizers/train_bpe.py --text reports.txt --vocab-size 8192 --out DIR   # one report a line
    python tokenizers/train_bpe.py --data data/mimic --vocab-size 8192 --out DIR    # what medim prepare made

A dataset keeps its reports as text, so it may have been prepared with another text tokenizer.
Writes a HuggingFace tokenizer folder and manifest.json (command, text, sha256). Any text can be encoded and comes back
exactly: bytes that were never seen are tokens too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from medim.cli import run
from medim.errors import UserError

EOS = "<eos>"


def train(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) whose id 0 is ``<eos>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, help="a text file, one report a line (default: the embedded reports)")
    text.add_argument("--data", type=Path, help="a folder of medim prepare: the reports of its split train")
    parser.add_argument("--reports", type=int, default=6000, help="number of embedded reports (default 6000)")
    parser.add_argument("--vocab-size", type=int, default=512, help="most ids, <eos> and 256 bytes included")
    args = parser.parse_args(argv)
    if args.text:
        if not args.text.is_file():
            raise UserError(f"--text {args.text}: no such file")
        texts: Iterator[str] = iter(args.text.read_text(encoding="utf-8").splitlines())
    elif args.data:
        from medim.data import prepare

        texts = (report for report in prepare.load(args.data, split="train")["report"] if report)
    else:
        from medim.data import embedded

        texts = (make().report for make in embedded.studies(args.reports))
    tokenizer = train(texts, args.vocab_size)
    tokenizer.save_pretrained(str(args.out))
    source = str(args.text or args.data or f"{args.reports} embedded training reports")
    manifest = {
        "command": " ".join(["python tokenizers/train_bpe.py", *argv]),
        "text": source,
        "size": len(tokenizer),
        "licence": "Apache-2.0",
        "sha256": {"tokenizer.json": hashlib.sha256((args.out / "tokenizer.json").read_bytes()).hexdigest()},
    }
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{args.out}: {len(tokenizer)} ids")


if __name__ == "__main__":
    sys.exit(main())
