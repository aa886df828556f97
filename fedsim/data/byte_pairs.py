"""Vocabularies of pieces of words, trained on the text itself."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from types import ModuleType

import numpy as np

WORD = re.compile(r" ?\w+| ?[^\w\s]+|\s+(?!\S)|\s+")
"""A word or a run of signs with the space before it, or white space; every character is part of one of them."""


class BytePairs:
    """Byte-pair encoding: start from the characters, and join the most frequent pair of neighbours, again and again.

    Pairs are joined within words and not across them. Characters that the training text does not have are left out.
    The joined pieces of a text are the text again.

    Parameters
    ----------
    text : str
        Text to learn the pairs from.
    size : int
        Largest number V of pieces, at least the number of different characters.

    Raises
    ------
    ValueError
        If ``size`` is below the number of different characters.
    ModuleNotFoundError
        If the library ``tokenizers`` is not installed.

    References
    ----------
    Sennrich, Haddow, Birch 2016, Neural machine translation of rare words with subword units, arXiv 1508.07909.
    """

    def __init__(self, text: str, size: int) -> None:
        tokenizers = _tokenizers()
        characters = len(set(text))
        if size < characters:
            raise ValueError(
                f"vocabulary = {size} must be 0, or at least the {characters} characters of the text"
            )
        self._coder = tokenizers.Tokenizer(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, show_progress=False)
        self._coder.train_from_iterator(_words(text), trainer)
        known = self._coder.get_vocab()
        self.pieces = tuple(sorted(known, key=known.__getitem__))
        """The text of every token, by number."""

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Cut a text into pieces.

        Parameters
        ----------
        text : str
            Any text.

        Returns
        -------
        tuple of np.ndarray
            Numbers of the pieces, and of the character in which each begins, int64.
        """
        index: dict[str, int] = {}
        order = np.fromiter((index.setdefault(word, len(index)) for word in _words(text)), np.int64)
        if not len(order):
            return order, order
        coded = self._coder.encode_batch(list(index))  # every word once
        count = np.array([len(c.ids) for c in coded])
        ids = np.array([i for c in coded for i in c.ids], dtype=np.int64)
        starts = np.array([first for c in coded for first, _ in c.offsets], dtype=np.int64)
        length = np.array([len(word) for word in index])
        word_start = np.cumsum(length[order]) - length[order]
        piece = _runs((np.cumsum(count) - count)[order], count[order])
        return ids[piece], starts[piece] + np.repeat(word_start, count[order])


def _runs(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Join the ranges ``first[i] .. first[i] + count[i] - 1``."""
    end = np.cumsum(count)
    return np.arange(end[-1]) + np.repeat(first - (end - count), count)


def _words(text: str) -> Iterator[str]:
    return (match.group() for match in WORD.finditer(text))


def _tokenizers() -> ModuleType:
    """Import the library, or say which extra it is in."""
    try:
        return importlib.import_module("tokenizers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a byte-pair vocabulary needs tokenizers: install the extra fedsim[text], or set vocabulary = 0"
        ) from error
