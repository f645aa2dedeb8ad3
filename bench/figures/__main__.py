"""Every figure of README and docs: which file of results holds it, and which command made that.

    python -m bench.figures            # lists them, and checks that each file holds its figures
    python -m bench.figures --write    # fills in the tables anew

A table stands between `<!-- figures: NAME -->` and `<!-- /figures -->` and is made of its file
alone (tables.py). A figure within a sentence is an entry of prose.yaml, where `is` leads to it in a
JSON file and `holds` is what another file says. What looks like a measurement and is neither is an
error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

from bench.common import ROOT
from bench.figures.tables import TABLES, drawn

PROSE = Path(__file__).with_name("prose.yaml")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n)(.*?)(<!-- /figures -->)", re.S)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`|<!--.*?-->|^    .*$", re.S | re.M)
UNIT = r"(?:times|%|s|ms|minutes|hours|bytes|[kMGT]i?B|[kM]?B/s|GB/s|nats|TFLOP/s)"
FIGURE = re.compile(rf"(?<![\w.^-])\d[\d.]*(?:e-?\d+)?(?: ?{UNIT}|x)(?![\w^-])")


class Figure(NamedTuple):
    document: str
    says: str
    file: str
    command: str
    wrong: str = ""


def tables(write: bool) -> Iterator[Figure]:
    for path in DOCUMENTS:
        text = path.read_text()
        for opening, name, inside, _ in BLOCK.findall(text):
            known = TABLES[name]
            ours = drawn(name) + "\n"
            if write:
                text = text.replace(f"{opening}{inside}<", f"{opening}{ours}<")
            wrong = "" if write or inside == ours else "is not what the file says: --write"
            name = f"table {name!r}"
            yield Figure(str(path.relative_to(ROOT)), name, known.file, known.command, wrong)
        if write:
            path.write_text(text)


def prose() -> Iterator[Figure]:
    for source in yaml.safe_load(PROSE.read_text()):
        file, command = source["file"], source["command"]
        held = (ROOT / file).read_text()
        for entry in source["figures"]:
            wrong = ""
            said = one_line((ROOT / entry["in"]).read_text())
            if entry["says"] not in said:
                wrong = f"{entry['in']} does not say so"
            elif "is" in entry:
                wrong = differs(entry["says"], found_at(json.loads(held), entry), entry)
            elif "sum" in entry:
                wrong = differs(entry["says"], eval(entry["sum"], {"__builtins__": {}}), entry)
            elif one_line(entry["holds"]) not in one_line(held):
                wrong = f"{file} does not hold {entry['holds']!r}"
            yield Figure(entry["in"], entry["says"], file, command, wrong)


def one_line(text: str) -> str:
    return " ".join(text.split())


def found_at(value: Any, entry: dict[str, Any]) -> float:
    """What `is` leads to, times `times`, or its inverse."""
    for key in entry["is"]:
        by_number = isinstance(value, dict) and key not in value
        value = list(value.values())[key] if by_number else value[key]
    number = float(value) * entry.get("times", 1)
    return 1 / number if entry.get("inverse") else number


def differs(says: str, value: float, entry: dict[str, Any]) -> str:
    """Whether the last number that is said (or `number`) is the value, to as many digits."""
    number = entry.get("number") or re.findall(r"\d[\d.]*", says)[-1].rstrip(".")
    told = f"{value:.{len(number.partition('.')[2])}f}"
    return "" if told == number else f"it is {value:.6g}"


def unlisted(listed: list[Figure]) -> Iterator[Figure]:
    """What looks like a measurement, and no entry speaks of."""
    for path in DOCUMENTS:
        name = str(path.relative_to(ROOT))
        text = one_line(CODE.sub(" ", BLOCK.sub("", path.read_text())))
        for one in listed:
            if one.document == name:
                text = text.replace(one_line(CODE.sub(" ", one.says)), "")
        for match in FIGURE.finditer(text):
            near = text[max(0, match.start() - 40) : match.end() + 30]
            yield Figure(name, match[0], "", "", f"is in no file that prose.yaml names: ..{near}..")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="Fill in the tables anew.")
    options = parser.parse_args()
    found = [*tables(options.write), *prose()]
    found += unlisted(found)
    shown = Table("document", "figure", "file", "command", "")
    for one in found:
        shown.add_row(*one[:4], one.wrong or "held", style="red" if one.wrong else None)
    Console(width=None if sys.stdout.isatty() else 200).print(shown)
    wrong = sum(bool(one.wrong) for one in found)
    print(f"{len(found) - wrong} figures held, {wrong} not")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
