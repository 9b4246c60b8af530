"""The command line is a promise: every command's arguments, with types and defaults, as `command_line.txt` has them.

A change that is meant is written down by

    python -m tests.project.test_command_line > tests/project/command_line.txt
"""

import argparse
import difflib
import types
import typing
from pathlib import Path

from endprompt import cli

KEPT = Path(__file__).with_name("command_line.txt")


def command_line() -> str:
    """A line for each argument of each command: `command --flag: type = default`."""
    lines = []
    for entry in sorted(cli.entry_points(group=cli.GROUP), key=lambda entry: entry.name):
        actions = cli.command_parser(entry, entry.load())._actions
        lines += [f"{entry.name} {argument(one)}" for one in actions if one.dest not in ("help", "print_shtab")]
    return "\n".join(lines) + "\n"


def argument(action: argparse.Action) -> str:
    flags = " ".join(action.option_strings) or action.dest.upper()
    kind = getattr(action, "_typehint", None)
    if kind is None:  # the parser's own: --config, --print_config
        return flags
    return f"{flags}: {spelled(kind)} = {action.default!r}" if action.option_strings else f"{flags}: {spelled(kind)}"


def spelled(kind: typing.Any) -> str:
    """A type in one spelling for every version of Python."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(spelled, parts))
    if origin is typing.Literal:
        return " | ".join(map(repr, parts))
    if parts:
        return f"{origin.__name__}[{', '.join(map(spelled, parts))}]"
    if kind is ...:
        return "..."
    return "None" if kind is types.NoneType else kind.__name__


def test_the_command_line_is_as_it_was():
    kept, now = KEPT.read_text(encoding="utf-8"), command_line()
    changes = difflib.unified_diff(kept.splitlines(), now.splitlines(), "command_line.txt", "now", n=0, lineterm="")
    assert kept == now, "\n".join(["the command line has changed:", *changes, __doc__])


if __name__ == "__main__":
    print(command_line(), end="")
