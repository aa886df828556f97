"""A sample of text by a language model: ``sample.json`` of a run directory, shown in its report."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.func import functional_call

from fedsim import random
from fedsim.checkpoints import replace_file, writing
from fedsim.federation import Federation
from fedsim.tree import Tree

FILE = "sample.json"

LENGTH = 300
"""Tokens that are drawn."""

TEMPERATURE = 0.8
"""Logits are divided by it; below 1 likely tokens become likelier."""

Sample = dict[str, str]
"""``prompt`` and the ``text`` that goes on from it."""


def draw(
    federation: Federation, model: Tree, seed: int, length: int = LENGTH, temperature: float = TEMPERATURE
) -> Sample:
    """Let a language model go on from the first window of the test text, or of the training text without one.

    Token t is the smallest v with ``p_0 + ... + p_v > u_t``, ``p`` being the softmax of the logits at the last
    position of the T tokens before, divided by the temperature, and ``u_t`` a function of the seed: the same
    seed and model give the same text.

    Parameters
    ----------
    federation : Federation
        With data of task "tokens" whose ``labels`` say what each token stands for.
    model : Tree
        Parameters.
    seed : int
        Of the draws.
    length : int
        Tokens to draw, >= 1.
    temperature : float
        > 0.

    Returns
    -------
    dict of str to str
        ``prompt`` and ``text``.
    """
    data, labels = federation.dataset, federation.dataset.labels
    window = (data.test_x if len(data.test_x) else data.x)[0]
    tokens = window.tolist()
    u = random.uniform(random.key(seed, "sample"), torch.arange(length)).tolist()
    with torch.no_grad():
        for t in range(length):
            x = torch.tensor(tokens[-len(window) :], device=window.device)
            logits = functional_call(federation.module, model, (x[None],))[0, -1]
            total = (logits.double() / temperature).softmax(-1).cumsum(-1).cpu()
            # The last sum may fall short of 1 by rounding.
            tokens.append(min(int(torch.searchsorted(total, u[t], right=True)), len(total) - 1))
    said = [labels[i] for i in tokens]
    return {"prompt": "".join(said[: len(window)]), "text": "".join(said[len(window) :])}


def write(path: Path, federation: Federation, model: Tree, seed: int) -> None:
    """Draw and write the sample of a run, if its data are text.

    Parameters
    ----------
    path : Path
        Run directory.
    federation : Federation
        Data and module.
    model : Tree
        Final parameters.
    seed : int
        The run's.
    """
    if federation.dataset.task == "tokens" and federation.dataset.labels:
        with writing(path):
            replace_file(path / FILE, (json.dumps(draw(federation, model, seed), indent=2) + "\n").encode())


def read(path: Path) -> Sample:
    """Read the sample of a run directory; empty if there is none."""
    file = path / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
