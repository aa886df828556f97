"""Text as characters: windows of tokens and the tokens that come next."""

from __future__ import annotations

import numpy as np
import torch

from fedsim.data.dataset import Dataset


def windows(
    text: str,
    test_text: str | None,
    *,
    context: int,
    rows: int | None,
    name: str,
    worker_of_character: np.ndarray | None = None,
) -> Dataset:
    """Cut text into windows, ``x[i] = t[iT : (i + 1) T]`` and ``y[i]`` the same one character later.

    The vocabulary is the sorted set of the characters of the training text; other characters are left out of the
    test text. ``x`` and ``y`` are views of one vector of tokens.

    Parameters
    ----------
    text : str
        Text to train on.
    test_text : str | None
        Text to test on; None takes the last tenth of ``text`` for it.
    context : int
        Characters T of a window, >= 1.
    rows : int | None
        Take the first windows only, and as few as a ninth of them (rounded up) for the test; None takes all.
    name : str
        Name of the data set.
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
    codes = _codes(text)
    if test_text is None:
        split = int(0.9 * len(codes))
        codes, test_codes = codes[:split], codes[split:]
    else:
        test_codes = _codes(test_text)
    present = np.bincount(codes) > 0
    vocabulary = present.nonzero()[0]
    token = np.cumsum(present) - 1
    test_codes = test_codes[np.isin(test_codes, vocabulary)]

    x, y = _windows(token[codes], context)
    if len(x) == 0:
        raise ValueError(
            f"{name}: context = {context} leaves no window, the training text has {len(codes):,} characters"
        )
    workers = None
    if worker_of_character is not None:
        owner = worker_of_character[: len(x) * context].reshape(-1, context)
        whole = torch.from_numpy(owner[:, 0] == owner[:, -1])
        x, y, workers = x[whole], y[whole], torch.from_numpy(owner[:, 0].copy())[whole]
    test_x, test_y = _windows(token[test_codes], context)
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
        num_outputs=len(vocabulary),
        task="tokens",
        name=name,
        workers=workers,
        labels=tuple(map(chr, vocabulary)),
    )


def _codes(text: str) -> np.ndarray:
    """Code points ``[len(text)]``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)


def _windows(tokens: np.ndarray, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.from_numpy(tokens)
    n = max(len(t) - 1, 0) // context
    return t[: n * context].view(n, context), t[1 : n * context + 1].view(n, context)
