"""A HuggingFace text tokenizer behind the three things a canvas needs: ids, text, and the end-of-text id."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from medim.errors import UserError


class TextTokenizer:
    """Text to ids and back. No special token is ever added: the canvas writes ``<eos>`` and tags itself."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the text tokenizer has no end-of-text token: set `eos_token` in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)

    @property
    def size(self) -> int:
        """Number of text ids, added tokens included."""
        return len(self.tokenizer)

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """Ids that end a sentence: those of tokens that end in a full stop, a question or an exclamation mark."""
        words = self.tokenizer.get_vocab().items()
        return tuple(sorted(number for word, number in words if word.endswith((".", "?", "!"))))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens; one that is spelled out in `text` is letters like any other."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first end-of-text id."""
        ids = list(ids)
        end = ids.index(self.eos) if self.eos in ids else len(ids)
        return str(self.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's own files."""
        self.tokenizer.save_pretrained(str(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextTokenizer:
        """Read a tokenizer folder.

        Raises:
            UserError: the folder is missing or holds no tokenizer.
        """
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such text tokenizer folder")
        try:
            return cls(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder}: not a text tokenizer: {' '.join(str(error).split())[:200]}") from error
