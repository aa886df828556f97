"""Tensors in safetensors' format, with their order and which names mean the same tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsim.tree import Tree


def pack(flat: Tree, about: dict[str, str]) -> bytes:
    """Write tensors as the content of a file.

    Parameters
    ----------
    flat : Tree
        What is written; a tensor that it holds under several names is written once.
    about : dict of str to str
        Written along.

    Returns
    -------
    bytes
        In safetensors' format.
    """
    first: dict[tuple[Any, ...], str] = {}
    names: dict[str, str] = {}
    stored: Tree = {}
    for name, x in flat.items():
        where = (x.data_ptr(), x.dtype, x.shape, x.stride()) if x.numel() else (name,)
        names[name] = first.setdefault(where, name)
        if names[name] == name:
            stored[name] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
    return save(stored, about | {"names": json.dumps(names)})


def unpack(file: Path, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `pack` wrote.

    Parameters
    ----------
    file : Path
        The file.
    device : torch.device
        Where tensors shall be.

    Returns
    -------
    tuple of dict of str to Tensor and dict of str to str
        The tensors in their order, and what was written along.

    Raises
    ------
    SafetensorError, KeyError, ValueError
        If the file is damaged.
    """
    with safe_open(file, framework="pt") as opened:
        about = opened.metadata() or {}
        stored = {k: opened.get_tensor(k).to(device) for k in opened.keys()}  # noqa: SIM118
    names = json.loads(about["names"])
    return {name: stored[first] for name, first in names.items()}, about


def read_tree(file: Path) -> Tree:
    """Read the tensors that `pack` wrote, on the CPU.

    Parameters
    ----------
    file : Path
        The file.

    Returns
    -------
    Tree
        In its order.

    Raises
    ------
    ValueError
        If the file is damaged, in one line.
    """
    try:
        return unpack(file, torch.device("cpu"))[0]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: is damaged ({error})") from None
