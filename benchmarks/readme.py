"""Write the tables of the README: ``python -m benchmarks.readme``.

``components`` is made from the registry. A measured section lies between ``<!-- speed:begin -->`` and ``<!-- speed:end -->`` (or ``growth``, ``attacks``, ``faults``, ``nodes``, ``load``) and is made from
``benchmarks/results/speed.json`` (``growth.json``, ``attacks.json`` and so on).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks import attacks, faults, load, nodes, tables
from fedsim.registry import REGISTRY, describe

RESULTS = Path(__file__).parent / "results"
SECTIONS = {
    "speed": tables.speed_markdown,
    "growth": tables.growth_markdown,
    "attacks": attacks.markdown,
    "faults": faults.markdown,
    "nodes": nodes.markdown,
    "load": load.markdown,
}


def components() -> str:
    """List all that experiments can name, one line each."""
    lines = ["| | name | what it is |", "| --- | --- | --- |"]
    for kind in REGISTRY:
        for i, (name, _, summary) in enumerate(describe(kind)):
            said = summary.replace("``", "`").replace("|", "\\|")
            lines.append(f"| {kind if i == 0 else ''} | `{name}` | {said} |")
    return "\n".join(lines)


def replace_section(text: str, name: str, content: str) -> str:
    r"""Return the text with another content between the markers of a section.

    Raises
    ------
    ValueError
        If the text does not have exactly one such section.

    Examples
    --------
    >>> replace_section("a <!-- x:begin -->old<!-- x:end --> b", "x", "new")
    'a <!-- x:begin -->\nnew\n<!-- x:end --> b'
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"there must be one section from {begin} to {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content.strip()}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Rewrite all sections for which there are results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--readme", type=Path, default=Path(__file__).parents[1] / "README.md")
    given = parser.parse_args()
    text = given.readme.read_text(encoding="utf-8")
    text = replace_section(text, "components", components())
    for name, make in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            try:
                text = replace_section(text, name, make(json.loads(file.read_text(encoding="utf-8"))))
            except ValueError as error:
                sys.exit(f"{given.readme}: {error}")
            print(f"{given.readme}: {name} written")
    given.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
