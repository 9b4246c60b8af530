"""The `endprompt` script: finds a command by its entry point, reads its configuration, runs it.

A command is a function of one typed dataclass, `def extend(config: ExtendConfig) -> int | None`, named under the
entry-point group `endprompt.commands`. Fields without a default are positional arguments, all others are flags; a YAML
file given by `--config` sets any of them, later flags override it, `--print_config` prints the whole.

Exit codes: 0 done, 1 failed, 2 bad usage. This module imports nothing of the project, and only the command that is
called.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
import typing
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any

GROUP = "endprompt.commands"


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {ep.name: ep for ep in entry_points(group=GROUP)}
    if not argv or argv[0] in ("-h", "--help"):
        print(overview(commands))
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(version("endprompt-lab"))
        return 0
    name, rest = argv[0], argv[1:]
    if name not in commands:
        import difflib

        near = difflib.get_close_matches(name, commands, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else f"; commands: {', '.join(sorted(commands))}"
        return fail(f"unknown command {name!r}{hint}", 2)
    return run(commands[name], rest)


def run(entry_point: EntryPoint, argv: list[str]) -> int:
    command = entry_point.load()
    config_type = typing.get_type_hints(command)["config"]
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"endprompt {entry_point.name}", description=(command.__doc__ or "").strip())
    parser.add_argument("--config", action="config", help="a YAML file; flags given after it override it")
    parser.add_class_arguments(config_type, as_positional=True)
    namespace = parser.parse_args(
        as_shells_write(argv, typing.get_type_hints(config_type))
    )  # bad usage: prints the key, the value and the rule, exits with 2
    fields = parser.instantiate_classes(namespace).as_dict()
    fields.pop("config", None)
    try:
        return command(config_type(**fields)) or 0
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except (ValueError, OSError, ImportError) as error:
        # The project raises these with a message for the user; a traceback is one environment variable away.
        if os.environ.get("ENDPROMPT_TRACEBACK"):
            raise
        return fail(one_line(error), 1)


def as_shells_write(argv: list[str], types: dict[str, Any]) -> list[str]:
    """Flags as a shell gives them, for jsonargparse: `--key a b` as `--key ["a","b"]` if key is a list, a bare `--key`
    as `--key true` if it is a switch."""
    out: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        out.append(word)
        kind = types.get(word[2:].replace("-", "_")) if word.startswith("--") else None
        start = position
        while position < len(argv) and not argv[position].startswith("--"):
            position += 1
        values = argv[start:position]
        if kind is bool and values[:1] not in (["true"], ["false"]):
            values = ["true", *values]
        elif typing.get_origin(kind) is list and values and not (len(values) == 1 and values[0].startswith("[")):
            text = typing.get_args(kind)[0] is str
            values = ["[" + ",".join(json.dumps(value) if text else value for value in values) + "]"]
        out += values
    return out


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def fail(message: str, code: int) -> int:
    print(f"endprompt: {message}", file=sys.stderr)
    return code


def overview(commands: dict[str, EntryPoint]) -> str:
    width = max((len(name) for name in commands), default=0)
    lines = [f"  {name:<{width}}  {summary(ep)}".rstrip() for name, ep in sorted(commands.items())]
    return "\n".join(
        [
            "usage: endprompt COMMAND [options]      (endprompt COMMAND --help explains one)",
            "",
            "Long-context extension by positional supervision: train, verify, score, draw.",
            "",
            *lines,
        ]
    )


def summary(entry_point: EntryPoint) -> str:
    """First line of the command's docstring, read from the source without importing it (start-up stays fast)."""
    module, _, function = entry_point.value.partition(":")
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return ""
    path = Path(spec.submodule_search_locations[0], *rest.split(".")).with_suffix(".py")
    if not path.is_file():
        return ""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


if __name__ == "__main__":
    sys.exit(main())
