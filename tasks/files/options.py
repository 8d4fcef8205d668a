"""Options and help texts of the commands of `cf`, all in one table: commands.toml, which says what its words mean."""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

TYPES = {"path": Path, "int": int, "float": float}


@cache
def read_table() -> dict[str, Any]:
    """Read the table."""
    return tomllib.loads(Path(__file__).with_name("commands.toml").read_text(encoding="utf-8"))


def read_commands() -> dict[str, dict[str, Any]]:
    """Return the table's entries by command, in the order of `cf --help`."""
    return {name: entry for name, entry in read_table().items() if isinstance(entry, dict)}


def parse_options(
    command: str, argv: list[str], about: str | None = None, helps: Mapping[str, str | None] = MappingProxyType({})
) -> argparse.Namespace:
    """Parse the options of a command, whose verb, where it has verbs, becomes `verb`.

    `about` is shown if the table says nothing of the command, and `helps`, by name of the value, if it says nothing of an option.
    """
    entry, form = read_commands()[command], argparse.RawDescriptionHelpFormatter
    about, epilog = entry.get("about", about), entry["epilog"]
    parser = argparse.ArgumentParser(f"cf {command}", description=about, epilog=epilog, formatter_class=form)
    _add_options(parser, entry.get("options", ()), helps)
    if verbs := entry.get("verbs"):
        below = parser.add_subparsers(dest="verb", required=True)
        for verb, its in verbs.items():
            _add_options(below.add_parser(verb, help=its["help"]), its.get("options", ()), helps)
    return parser.parse_args(argv)


def _add_options(parser: argparse.ArgumentParser, options: Sequence[Mapping[str, Any]], helps: Mapping[str, str | None]) -> None:
    """Add options of the table, with its four words that argparse does not know."""
    groups: dict[str, Any] = {"": parser}
    for option in options:
        words = {"heading": "", "either": False, "between": None, "help": helps.get(option.get("dest", "")), **option}
        name, heading, either, between = (words.pop(word) for word in ("name", "heading", "either", "between"))
        if either and (heading := "either") not in groups:
            groups[heading] = parser.add_mutually_exclusive_group(required=True)
        elif heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        if "type" in words:
            words["type"] = TYPES[words["type"]]
        if isinstance(words.get("metavar"), list):
            words["metavar"] = tuple(words["metavar"])  # a name for each of several values
        choices = {"choices": range(between[0], between[1] + 1)} if between else {}
        groups[heading].add_argument(name, **words, **choices)
