"""The `medim` command, and what `train.py`, `sample.py` and `tokenizers/train_vq.py` call.

Heavy imports come after the arguments are read.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from medim.cli.estimate import estimate
from medim.cli.importing import import_
from medim.cli.inspection import inspect
from medim.cli.merge import merge
from medim.cli.preparation import prepare
from medim.cli.publishing import push
from medim.cli.sampling import sample
from medim.cli.scoring import score
from medim.cli.search import search
from medim.cli.start import init
from medim.cli.tokenizers import tokenizer, train_vq
from medim.cli.training import export, train
from medim.errors import UserError

__all__ = [
    "estimate",
    "export",
    "import_",
    "init",
    "inspect",
    "main",
    "merge",
    "prepare",
    "push",
    "run",
    "sample",
    "score",
    "search",
    "tokenizer",
    "train",
    "train_vq",
]


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command as a user meets it: a mistake is one line on stderr and exit code 2."""
    rank = os.environ.get("RANK", "0")
    label = "error:" if rank == "0" else f"rank {rank}: error:"
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        for line in str(error).splitlines():
            print(f"{label} {line}", file=sys.stderr)
        return 2
    except ImportError as error:  # an optional package: its message says what to install
        print(f"{label} {error}; see README.md on how to install", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written, a file where one is to be made
        known = error.filename is not None and error.strerror
        print(f"{label} {f'{error.filename}: {error.strerror}' if known else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "train a model, or go on with a run"),
    "init": (init, "a pretrained language model as the start of a run"),
    "estimate": (estimate, "what a training run will cost: memory, FLOPs, hours"),
    "import": (import_, "a checkpoint that others published, as a folder of ours"),
    "export": (export, "a training checkpoint as a model folder"),
    "sample": (sample, "make pairs, reports, images, or parts of them"),
    "prepare": (prepare, "encode studies once, before training"),
    "inspect": (inspect, "what is in a prepared dataset, and what is wrong with it"),
    "score": (score, "bits that a model needs for each study; which report fits"),
    "search": (search, "studies by a text or a picture"),
    "merge": (merge, "adapters into the model that they were trained over"),
    "push": (push, "a model to the HuggingFace hub, with its card"),
    "tokenizer": (tokenizer, "check an image tokenizer, ours or a published one"),
}


def _medim(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("medim COMMAND ...: unified generation of medical images and reports\n")
        print("\n".join(f"  medim {name:11}{text}" for name, (_, text) in COMMANDS.items()))
        print("\n`medim COMMAND --help` teaches one. Benchmarks: python -m eval.run --help")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"medim {argv[0]}: unknown command; one of {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]][0](argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(_medim, argv)
