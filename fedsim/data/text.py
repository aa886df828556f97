"""Text as characters or pieces of words: windows of tokens and the tokens that come next."""

from __future__ import annotations

import numpy as np
import torch

from fedsim.data.byte_pairs import BytePairs
from fedsim.data.dataset import Dataset


def windows(
    text: str,
    test_text: str | None,
    *,
    context: int,
    rows: int | None,
    name: str,
    vocabulary: int = 0,
    worker_of_character: np.ndarray | None = None,
) -> Dataset:
    """Cut text into windows, ``x[i] = t[iT : (i + 1) T]`` and ``y[i]`` the same one token later.

    The vocabulary is the sorted set of the characters of the training text, or `BytePairs` trained on it; other
    characters are left out of the test text. ``x`` and ``y`` are views of one vector of tokens. Perplexity is that of a
    token, and so cannot be compared between vocabularies.

    Parameters
    ----------
    text : str
        Text to train on.
    test_text : str | None
        Text to test on; None takes the last tenth of ``text`` for it.
    context : int
        Tokens T of a window, >= 1.
    rows : int | None
        Take the first windows only, and as few as a ninth of them (rounded up) for the test; None takes all.
    name : str
        Name of the data set.
    vocabulary : int
        0 for characters, or the size of a byte-pair vocabulary.
    worker_of_character : np.ndarray | None
        ``[len(text)]`` natural workers; windows that straddle two workers are left out.

    Returns
    -------
    Dataset
        Of task ``"tokens"``.

    Raises
    ------
    ValueError
        If the text is shorter than a window and one character, or has fewer windows than ``rows``.
    """
    if test_text is None:
        split = int(0.9 * len(text))
        text, test_text = text[:split], text[split:]
    tokens, test_tokens, labels, starts = _tokens(text, test_text, vocabulary)

    x, y = _windows(tokens, context)
    if len(x) == 0:
        unit = "tokens" if vocabulary else "characters"
        raise ValueError(
            f"{name}: context = {context} leaves no window, the training text has {len(tokens):,} {unit}"
        )
    workers = None
    if worker_of_character is not None:
        owner = worker_of_character[starts][: len(x) * context].reshape(-1, context)
        whole = torch.from_numpy(owner[:, 0] == owner[:, -1])
        x, y, workers = x[whole], y[whole], torch.from_numpy(owner[:, 0].copy())[whole]
    test_x, test_y = _windows(test_tokens, context)
    if rows is not None:
        if rows > len(x):
            raise ValueError(
                f"{name}: rows = {rows:,} is larger than the {len(x):,} windows of the training text"
            )
        x, y, workers = x[:rows], y[:rows], None if workers is None else workers[:rows]
        test_x, test_y = test_x[: -(-rows // 9)], test_y[: -(-rows // 9)]
    return Dataset(
        x,
        y,
        test_x,
        test_y,
        num_outputs=len(labels),
        task="tokens",
        name=name,
        workers=workers,
        labels=labels,
    )


def _tokens(
    text: str, test_text: str, vocabulary: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], np.ndarray]:
    """Tokens of both texts, what each stands for, and the characters in which those of the training text begin."""
    if vocabulary:
        pairs = BytePairs(text, vocabulary)
        tokens, starts = pairs.encode(text)
        return tokens, pairs.encode(test_text)[0], pairs.pieces, starts
    codes, test_codes = _codes(text), _codes(test_text)
    present = np.bincount(codes) > 0
    known = present.nonzero()[0]
    token = np.cumsum(present) - 1
    test_tokens = token[test_codes[np.isin(test_codes, known)]]
    return token[codes], test_tokens, tuple(map(chr, known)), np.arange(len(codes))


def _codes(text: str) -> np.ndarray:
    """Code points ``[len(text)]``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)


def _windows(tokens: np.ndarray, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.from_numpy(tokens)
    n = max(len(t) - 1, 0) // context
    return t[: n * context].view(n, context), t[1 : n * context + 1].view(n, context)
