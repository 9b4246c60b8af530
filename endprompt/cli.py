"""The `endprompt` script: finds a command by its entry point, reads its configuration, runs it.

A command is a function of one typed dataclass, `def extend(config: ExtendConfig) -> int | None`, named under the
entry-point group `endprompt.commands`. Fields without a default are positional arguments, all others are flags; a YAML
file given by `--config` sets any of them, later flags override it, `--print_config` prints the whole. `--recipe NAME`
is a configuration that the package ships, `--list-recipes` lists them.

Exit codes: 0 done, 1 failed, 2 bad usage. This module imports nothing of the project, and only the command that is
called.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import traceback
import typing
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any, Literal, NoReturn

GROUP = "endprompt.commands"

PACKAGES = ("endprompt", "analysis", "benchmarks", "paper_figures")

# How the parser refuses a value (key, kinds, value), and what the kinds are called here.
REFUSALS = (
    r'Parser key "(\w+)": Expected a (.+)\. Got value: (.*)',
    r'Parser key "(\w+)": .* Subtypes: \[(.+)\] Errors: .* Given value: (.*)',
)

KINDS = {
    "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false",
    "list[int]": "whole numbers", "list[float]": "numbers", "list[str]": "words",
    "dict[str, typing.Any]": "a mapping",
}  # fmt: skip

LONGEST = 1000  # characters of a message: a damaged file may be quoted in it


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
    try:
        return run(commands[name], rest)
    except KeyboardInterrupt as interrupt:
        return interrupted(argv, interrupt)


def run(entry_point: EntryPoint, argv: list[str]) -> int:
    stranger = foreign_package()
    if stranger:
        return fail(stranger, 1)
    recipes = recipe_files(entry_point)
    if "--list-recipes" in argv:
        print(recipe_list(recipes))
        return 0
    debug = "--debug" in argv or bool(os.environ.get("ENDPROMPT_TRACEBACK"))
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        command = entry_point.load()
    except Exception as error:
        if debug:
            raise
        return fail(told(error, None), 1)
    config_type = typing.get_type_hints(command)["config"]
    parser = command_parser(entry_point.name, (command.__doc__ or "").strip(), config_type)
    parser.add_argument("--config", action="config", help="a YAML file; flags given after it override it")
    parser.add_argument("--debug", action="help", help="show the whole traceback of an error, not one line")
    if recipes:
        parser.add_argument("--recipe", metavar="NAME", help="one of --list-recipes, as if it were given by --config")
        argv = with_recipe(argv, recipes)
    types = typing.get_type_hints(config_type)
    argv = as_shells_write(with_underscores(argv, types), types, has_positionals(config_type))
    argv = with_listed_words(argv, config_type)
    parser.add_class_arguments(config_type, as_positional=True)
    try:
        namespace = parser.parse_args(argv)  # bad usage: prints the key, the value and the rule, exits with 2
    except (ValueError, RecursionError) as error:
        return fail(f"the configuration cannot be read: {one_line(error)}: {' '.join(argv)}", 2)
    fields = parser.instantiate(namespace).as_dict()
    for key in ("config", "recipe"):
        fields.pop(key, None)
    config, began = None, time.time()
    try:
        config = config_type(**fields)
        return command(config) or 0
    except Exception as error:
        if debug:
            raise
        return fail(told(error, run_log(config, began)), 1)


def told(error: Exception, log: Path | None) -> str:
    """An error in one line. The project's own are ValueError, OSError and ImportError, with a message for the user.

    Anything else came from a package that we call, or is a fault of ours: the line names its type and the run's log, to
    which the traceback is added.
    """
    if isinstance(error, (ValueError, OSError, ImportError)) and not isinstance(error, UnicodeError):
        return one_line(error)
    kind, said, place = type(error).__name__, one_line(error), "--debug shows where"
    if log:
        record = {"time": round(time.time(), 3), "error": kind, "traceback": traceback.format_exception(error)}
        with contextlib.suppress(OSError), open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            place = f"the traceback is in {log}"
    return f"{kind}: {said} ({place})" if said != kind else f"{kind} ({place})"


def run_log(config: Any, began: float) -> Path | None:
    """Log of the run that a command was asked for, if it has written to it since it began."""
    for key in ("output", "directory"):
        value = getattr(config, key, None)
        for path in (Path(f"{value}.partial", "log.jsonl"), Path(value, "log.jsonl")) if value else ():
            if path.is_file() and path.stat().st_mtime >= began - 1:  # file systems round times
                return path
    return None


def command_parser(name: str, description: str, config_type: type) -> Any:
    """The parser of a command: its help shows flags as they are written, its errors are one line. Exits with 2."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Help(DefaultHelpFormatter):
        def start_section(self, heading: str | None) -> None:
            super().start_section(heading and textwrap.fill(heading, self._width - 1))

        def _format_action_invocation(self, action: argparse.Action) -> str:
            if not action.option_strings:
                return super()._format_action_invocation(action)
            names = [written(name) for name in action.option_strings if not name.endswith("+")]
            return ", ".join(names) + values(action)

        def _get_help_string(self, action: argparse.Action) -> str:
            if action.dest == "print_config":
                return "print the configuration that these arguments make, and stop"
            default = action.default
            unset = default is None or default is False or default in ("", [], argparse.SUPPRESS)
            return (action.help or "") + ("" if unset else f" (default: {plainly(default)})")

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            said = bad_usage(message, [written(flag) for action in self._actions for flag in action.option_strings])
            print(f"endprompt {name}: {said} (see endprompt {name} --help)", file=sys.stderr)
            sys.exit(2)

    positionals = "".join(f" {f.name.upper()}" for f in dataclasses.fields(config_type) if is_positional(f))
    usage = f"endprompt {name}{positionals} [options]"
    return Parser(prog=f"endprompt {name}", usage=usage, description=description, formatter_class=Help)


def written(flag: str) -> str:
    return flag if flag == "--print_config" else flag.replace("_", "-")


def values(action: argparse.Action) -> str:
    """What stands behind a flag in the help: nothing for a switch, else the flag's name in capitals."""
    kind = getattr(action, "_typehint", None)
    if action.nargs == 0 or action.dest == "print_config" or (kind is bool and not action.default):
        return ""
    if kind is bool:
        return " true|false"
    name = action.dest.upper()
    return f" {name} ..." if kind is not None and _is_list(kind) else f" {name}"


def plainly(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


def bad_usage(message: str, flags: list[str]) -> str:
    """What the parser says, in one line: with key, value and rule, or with the flag that may have been meant."""
    import difflib

    line = one_line(ValueError(message))
    found = [match.groups() for match in (re.fullmatch(form, line) for form in REFUSALS) if match]
    key, rule, value = found[0] if found else ("", "", "")
    if choices := re.match(r"typing\.Literal\[(.+)\]", rule):
        rule = f"one of {choices[1]}".replace("'", "")
    elif rule:
        kinds = [kind.removeprefix("<class '").removesuffix("'>") for kind in re.split(r", (?![^\[]*\])", rule)]
        rule = " or ".join(KINDS.get(kind, kind) for kind in kinds if kind != "NoneType")
    if rule:
        return f"{key} must be {rule}: {key}={value}"
    if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", line):
        near = difflib.get_close_matches(unknown[1], flags, n=1)
        line += f"; did you mean {near[0]}?" if near else ""
    return re.sub(r"argument (--[\w-]+)/\S+:", r"\1:", line)


def interrupted(argv: list[str], interrupt: KeyboardInterrupt) -> int:
    """Say how to go on after Ctrl-C. A command that can go on raises it with the flags that this takes, as a dict."""
    if os.environ.get("RANK", "0") != "0":  # once for all processes of torchrun
        return 130
    if not (interrupt.args and isinstance(interrupt.args[0], dict)):
        return fail("interrupted", 130)
    script = [*launcher(), *argv]
    for key, value in interrupt.args[0].items():
        script += [f"--{key}", *([] if value is True else [str(value).lower()])]
    return fail(f"interrupted, what is done is kept; go on with: {shlex.join(script)}", 130)


def launcher() -> list[str]:
    """The words that started this script."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "endprompt.cli"]
    if Path(sys.argv[0]).name == "endprompt":
        return ["endprompt"]
    return [sys.executable, "-m", "endprompt.cli"]


def foreign_package() -> str | None:
    """What is wrong if one of our packages would be imported from elsewhere than beside this one, else None.

    Two of their names are common ones. A folder of that name in front of ours on the path would be imported instead.
    """
    here = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        places = [*(spec.submodule_search_locations or [spec.origin or ""])] if spec else []
        if not any(Path(place).resolve() == here / name for place in places[:1]):
            found = places[0] if places else "nowhere"
            return (
                f"the package {name!r} must be the one in {here}, but Python finds {found}: another of that name "
                f"stands before it on the path; run `endprompt` (not `python -m`) or `python -P -m endprompt.cli`, "
                f"check PYTHONPATH={os.environ.get('PYTHONPATH', '')!r}, or install into an environment of its own"
            )
    return None


def package_directory(entry_point: EntryPoint) -> Path | None:
    """Directory of the package that owns a command, found without importing the command."""
    spec = importlib.util.find_spec(entry_point.module.partition(".")[0])
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else None


def recipe_files(entry_point: EntryPoint) -> dict[str, Path]:
    """Configurations that a package ships for a command, by name: PACKAGE/recipes/COMMAND/NAME.yaml."""
    directory = package_directory(entry_point)
    found = (directory / "recipes" / entry_point.name).glob("*.yaml") if directory else ()
    return {path.stem: path for path in sorted(found)}


def recipe_list(recipes: dict[str, Path]) -> str:
    """Name and first comment line of each recipe."""
    width = max(map(len, recipes), default=0)
    firsts = {name: path.read_text(encoding="utf-8").partition("\n")[0] for name, path in recipes.items()}
    return "\n".join(f"{name:<{width}}  {first.lstrip('# ')}" for name, first in firsts.items())


def with_recipe(argv: list[str], recipes: dict[str, Path]) -> list[str]:
    """The arguments with `--recipe NAME` in terms of `--config FILE`, at its place."""
    out: list[str] = []
    rest = iter(argv)
    for argument in rest:
        if argument == "--recipe" or argument.startswith("--recipe="):
            name = argument.partition("=")[2] or next(rest, "")
            if name not in recipes:
                import difflib

                near = difflib.get_close_matches(name, recipes, n=3, cutoff=0.3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                sys.exit(fail(f"recipe must be one of --list-recipes: recipe={name!r}{hint}", 2))
            out += ["--config", str(recipes[name])]
        else:
            out.append(argument)
    return out


def with_underscores(argv: list[str], types: dict[str, Any]) -> list[str]:
    """The arguments with `--save-every` in terms of `--save_every`, the field's name."""
    out: list[str] = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        out.append(f"--{name}{equals}{value}" if flag.startswith("--") and name in types else argument)
    return out


def as_shells_write(argv: list[str], types: dict[str, Any], positionals: bool = False) -> list[str]:
    """The arguments as jsonargparse reads them.

    `--key a b` becomes `--key ["a","b"]` if the key is a list, a bare `--key` becomes `--key true` if it is a switch.
    positionals: the command has some, so a list takes one value only and does not swallow them.
    """
    out: list[str] = []
    place = 0
    while place < len(argv):
        argument = argv[place]
        place += 1
        flag, equals, value = argument.partition("=")
        own = types.get(flag[2:].replace("-", "_")) if equals and flag.startswith("--") else None
        if own is not None and _is_list(own) and not value.startswith("["):
            argument = f"{flag}={listed([value], own)}"
        out.append(argument)
        kind = types.get(argument[2:].replace("-", "_")) if argument.startswith("--") else None
        start = place
        while place < len(argv) and not argv[place].startswith("--"):
            place += 1
        values = argv[start:place]
        if kind is bool and (not values or values[0].lower() not in ("true", "false", "yes", "no")):
            values = ["true", *values]
        elif kind is not None and _is_list(kind) and values and not values[0].startswith("["):
            count = 1 if positionals else len(values)
            values = [listed(values[:count], kind), *values[count:]]
        out += values
    return out


def with_listed_words(argv: list[str], config_type: type) -> list[str]:
    """The arguments as jsonargparse reads them where the positional argument is a list: its words as one list, last."""
    fields = [f for f in dataclasses.fields(config_type) if is_positional(f)]
    if len(fields) != 1 or not _is_list(typing.get_type_hints(config_type)[fields[0].name]):
        return argv
    flags: list[str] = []
    words: list[str] = []
    place = 0
    while place < len(argv):
        argument = argv[place]
        takes = argument.startswith("--") and "=" not in argument and argument not in ("--help", "--print_config")
        (flags if argument.startswith("-") else words).append(argument)
        if takes and place + 1 < len(argv):
            place += 1
            flags.append(argv[place])
        place += 1
    if len(words) == 1 and words[0].startswith("["):
        return [*flags, *words]
    return [*flags, json.dumps(words)] if words else flags


def listed(values: list[str], kind: Any) -> str:
    """The values as jsonargparse reads a list of this kind."""
    words = "int" not in str(kind) and "float" not in str(kind)
    return f"[{','.join(json.dumps(value) if words else value for value in values)}]"


def has_positionals(config_type: type) -> bool:
    """Whether a field has no default, which makes it a positional argument."""
    return any(map(is_positional, dataclasses.fields(config_type)))


def is_positional(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _is_list(kind: Any) -> bool:
    """Whether a field is a list or a tuple (or None), and cannot be a single word."""
    parts = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    return all(part is type(None) or typing.get_origin(part) in (list, tuple) for part in parts)


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 2]} …"


def fail(message: str, code: int) -> int:
    print(f"endprompt: {message}", file=sys.stderr)
    return code


def overview(commands: dict[str, EntryPoint]) -> str:
    width = max((len(name) for name in commands), default=0)
    wide = min(120, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 1000
    lines = [
        textwrap.fill(
            f"{name:<{width}}  {summary(ep)}", wide, initial_indent="  ", subsequent_indent=" " * (width + 4)
        ).rstrip()
        for name, ep in sorted(commands.items())
    ]
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
    directory = package_directory(entry_point)
    path = directory and Path(directory, *entry_point.module.split(".")[1:]).with_suffix(".py")
    if not path or not path.is_file():
        return ""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == entry_point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


if __name__ == "__main__":
    sys.exit(main())


SCRIPT = """\
_endprompt() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" flags=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$flags" -- "$word")) ;;
    esac
}}
complete -o default -F _endprompt endprompt
"""

ZSH = "autoload -Uz +X compinit && compinit\nautoload -Uz +X bashcompinit && bashcompinit\n"


@dataclass
class CompletionConfig:
    """Settings of `endprompt completion`.

    Args:
        shell: bash or zsh.
    """

    shell: Literal["bash", "zsh"]


def script(shell: str) -> str:
    """The script that completes commands and flags; what stands after a flag is completed as a file."""
    flags = {ep.name: command_flags(ep) for ep in sorted(entry_points(group=GROUP), key=lambda ep: ep.name)}
    cases = "\n".join(f'        {name}) flags="{" ".join(own)}" ;;' for name, own in flags.items())
    made = SCRIPT.format(commands=" ".join(flags), cases=cases)
    return ZSH + made if shell == "zsh" else made


def command_flags(entry_point: typing.Any) -> list[str]:
    """The flags of a command, as its help has them."""
    config = typing.get_type_hints(entry_point.load())["config"]
    own = [field.name for field in dataclasses.fields(config) if not is_positional(field)]
    recipes = ["recipe", "list-recipes"] if recipe_files(entry_point) else []
    return [f"--{name.replace('_', '-')}" for name in ["help", "config", "debug", *recipes, *own]] + ["--print_config"]
