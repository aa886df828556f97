"""A resident without PyTorch, for tests: it answers what the kind of the request says."""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

from fedsim import resident


def answer(header: dict[str, Any], tensors: bytes) -> tuple[dict[str, Any], bytes]:
    kind = header["kind"]
    if kind == "raise":
        raise ValueError("no memory\nleft")
    if kind == "die":
        print("fatal: told to die", flush=True)
        os._exit(1)
    if kind == "sleep":
        time.sleep(header["seconds"])
    return header | {"pid": os.getpid()}, tensors


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code")
    parser.add_argument("--idle", type=float)
    parser.add_argument("--watch", type=int, action="append", default=[])
    given = parser.parse_args()
    if "FEDSIM_STUB_REFUSES" in os.environ:
        sys.exit("refuses to start")
    resident.run(given.folder, given.idle, given.watch, lambda: answer)
