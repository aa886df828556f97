"""Decoded data sets on disk, so that pictures are decoded once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "1"  # a new number makes all old files stale


@dataclass(frozen=True, eq=False)
class Decoded:
    """Tensors as they were stored, before any scaling.

    Parameters
    ----------
    tensors : dict[str, Tensor]
        ``x``, ``y``, ``test_x``, ``test_y`` and, where known, ``workers``.
    labels : tuple[str, ...]
        Names of the classes; empty for float targets.
    """

    tensors: dict[str, Tensor]
    labels: tuple[str, ...]


def cache_folder() -> Path:
    """Folder of the cache: the environment variable ``FEDSIM_CACHE``, or ``~/.cache/fedsim``."""
    return Path(os.environ.get("FEDSIM_CACHE") or Path.home() / ".cache" / "fedsim").expanduser()


def fingerprint(folder: Path) -> str:
    """Hash the names and contents of all files of a folder that are not hidden."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0".encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def find(name: str, content: tuple[object, ...]) -> Decoded | None:
    """Read what `keep` stored for the same content.

    Parameters
    ----------
    name : str
        Name of the data set.
    content : tuple[object, ...]
        All that the tensors depend on; its repr is the key.

    Returns
    -------
    Decoded | None
        The tensors; None if there is no file or it is broken.
    """
    try:
        with safe_open(_path(name, content), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dictionary
    except (FileNotFoundError, SafetensorError):
        return None
    if metadata.get("checksum") != _checksum(tensors):
        return None
    return Decoded(tensors, tuple(json.loads(metadata["labels"])))


def keep(name: str, content: tuple[object, ...], made: Decoded) -> None:
    """Store tensors for `find`; a folder that cannot be written gives a warning and nothing else.

    Parameters
    ----------
    name : str
        Name of the data set, for people who look into the folder.
    content : tuple[object, ...]
        All that the tensors depend on.
    made : Decoded
        The tensors.
    """
    path = _path(name, content)
    draft = path.with_suffix(f".{os.getpid()}.draft")
    metadata = {"labels": json.dumps(made.labels), "checksum": _checksum(made.tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(made.tensors, draft, metadata)
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        warnings.warn(f"{name} is not cached: {error}; set FEDSIM_CACHE to another folder", stacklevel=2)


def _path(name: str, content: tuple[object, ...]) -> Path:
    digest = hashlib.blake2b(repr((_FORMAT, *content)).encode(), digest_size=12).hexdigest()
    slug = "".join(c if c.isalnum() else "-" for c in name)
    return cache_folder() / f"{slug}-{digest}.safetensors"


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].numpy().tobytes(), total)
    return f"{total:08x}"
