"""The history of a run: ``history.jsonl``, a line a round."""

from __future__ import annotations

import errno
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

from fedsim.checkpoints import replace_file, writing

FILE = "history.jsonl"

Line = dict[str, Any]
"""Figures of a round by name."""


def append(file: io.RawIOBase, line: Line) -> None:
    """Append a whole line; nothing waits in a buffer.

    Parameters
    ----------
    file : io.RawIOBase
        Opened without a buffer.
    line : dict
        Figures of a round.

    Raises
    ------
    OSError
        If the disk takes only a part of it.
    """
    content = (json.dumps(line) + "\n").encode()
    if file.write(content) != len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read(path: Path) -> list[Line]:
    """Read the history of a run directory; a truncated line is ignored with a warning.

    Parameters
    ----------
    path : Path
        Run directory.

    Returns
    -------
    list of dict
        Lines, empty if there is no history.
    """
    file = path / FILE
    lines: list[Line] = []
    if not file.exists():
        return lines
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            warnings.warn(f"{file}: line {number} is truncated and ignored", stacklevel=3)
    return lines


def cut(path: Path, round: int) -> None:
    """Drop the lines behind a checkpoint: their rounds are run again."""
    lines = [json.dumps(line) + "\n" for line in read(path) if line["round"] <= round]
    with writing(path):
        replace_file(path / FILE, "".join(lines).encode())
