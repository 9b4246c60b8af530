"""The `endprompt` script: finds a command by its entry point, reads its configuration, runs it.

A command is a function of one typed dataclass, named under the entry-point group `endprompt.commands`. Fields without a
default are positional arguments, all others flags, in groups that the dataclass's docstring has as sections. A YAML
file given by `--config` sets any of them, by name or in its group; later flags override it, `--print_config` prints the
whole; `--recipe NAME` is one that the package ships. Exit codes: 0 done, 1 failed, 2 bad usage. This module imports
nothing of the project, and only the command that is called.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import re
import select
import shlex
import shutil
import signal
import sys
import textwrap
import time
import traceback
import typing
from collections.abc import Callable
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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # a process that is lost is said in one line, without torch's stacks
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {ep.name: ep for ep in entry_points(group=GROUP)}
    if not argv or argv[0] in ("-h", "--help"):
        overview(commands)[0].print_help()
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(version("endprompt-lab"))
        return 0
    name, rest = argv[0], argv[1:]
    if name not in commands:
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
    if "--list-recipes" in argv:
        print(recipe_list(recipe_files(entry_point)))
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
    parser = command_parser(entry_point, command)
    try:
        # bad usage: prints the key, the value and the rule, exits with 2
        fields = parser.parse_args(as_parsed(argv, config_type, recipe_files(entry_point))).as_dict()
    except (ValueError, RecursionError) as error:
        return fail(f"the configuration cannot be read: {one_line(error)}: {' '.join(argv)}", 2)
    fields.pop("config", None)
    config, began = None, time.time()
    try:
        config = config_type(**fields)
        return command(config) or 0
    except Exception as error:
        if debug:
            raise
        said = told(error, run_log(config, began))
        if isinstance(error, BrokenPipeError) and reader_left():
            return 128 + signal.SIGPIPE
        return fail(said, 1) if speaks() or "alone" in getattr(error, "__notes__", ()) else 1


def reader_left() -> bool:
    """Whether nobody reads standard output any more (`endprompt env | head`); then nothing more is written there."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    left = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def speaks() -> bool:
    """Whether this process says its error: of torchrun's the first that fails, and before they meet the main one."""
    distributed = sys.modules.get("endprompt.distributed")
    return distributed.first_to_fail() if distributed else os.environ.get("RANK", "0") == "0"


def told(error: Exception, log: Path | None) -> str:
    """An error in one line. The project's own are ValueError, OSError and ImportError, with a message for the user; of
    any other the line names its type and the run's log, to which the traceback is added.
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


def command_parser(entry_point: EntryPoint, command: Callable[..., Any]) -> Any:
    """The parser of a command, which exits with 2 and one line if it is used wrongly."""
    import jsonargparse
    import yaml

    class Help(argparse.HelpFormatter):
        def _format_action_invocation(self, action: argparse.Action) -> str:
            return super()._format_action_invocation(action).rstrip()  # nothing stands behind a switch

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            said = bad_usage(message, [flag for action in self._actions for flag in action.option_strings])
            print(f"endprompt {entry_point.name}: {said} (see endprompt {entry_point.name} --help)", file=sys.stderr)
            sys.exit(2)

    config_type = typing.get_type_hints(command)["config"]
    read = jsonargparse.get_loader("yaml")
    jsonargparse.set_loader("grouped", lambda text: ungrouped(read(text), config_type), (yaml.YAMLError, ValueError))
    positionals = "".join(f" {f.name.upper()}" for f in dataclasses.fields(config_type) if is_positional(f))
    positionals += f" [{word.upper()}]" if (word := getattr(config_type, "WORD", "")) else ""
    name, about = f"endprompt {entry_point.name}", inspect.getdoc(command) or ""
    options: dict[str, Any] = {"formatter_class": Help, "parser_mode": "grouped", "allow_abbrev": False}
    parser = Parser(name, usage=f"{name}{positionals} [options]", description=about, **options)
    parser.add_argument("--config", action="config", metavar="FILE", help="a YAML file; flags after it override it")
    parser.add_argument("--debug", action="help", help="show the whole traceback of an error, not one line")
    if recipe_files(entry_point):
        parser.add_argument("--recipe", action="help", help="NAME: one of --list-recipes, as if given by --config")
        parser.add_argument("--list-recipes", action="help", help="names of the recipes, and what they are")
    hints, groups = typing.get_type_hints(config_type), dict[str, Any]()
    for field in dataclasses.fields(config_type):
        heading, text = sections(config_type)[field.name]
        group = groups.get(heading) or groups.setdefault(heading, parser.add_argument_group(heading))
        text, kind = text.replace("%", "%%"), hints[field.name]
        if is_positional(field):
            group.add_argument(field.name, type=kind, help=text, metavar=field.name.upper())
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        shown = shown.lower() if isinstance(default, bool) else shown
        text += f" (default: {shown})" if shown and default is not None and default is not False else ""
        behind = field.name.upper() + (" ..." if is_list(kind) else "")
        if kind is bool:
            behind = "true|false" if default else ""
        flag = f"--{field.name.replace('_', '-')}"
        action = group.add_argument(flag, type=kind, default=default, help=text, metavar=behind)
        action.option_strings[:] = [flag]  # without `--key+`, which jsonargparse gives to lists
    return parser


def sections(config_type: type) -> dict[str, tuple[str, str]]:
    """(heading, help) of each field, as the docstrings of the dataclass and of those that it extends have them."""
    found, heading, name = {}, "", ""
    for line in [one for kind in config_type.__mro__ for one in inspect.cleandoc(kind.__doc__ or "").splitlines()]:
        if over := re.fullmatch(r"(\w+):", line):
            heading = over[1].lower().replace("args", "settings")
        elif field := re.fullmatch(r" {4}(\w+): (.*)", line):
            name = field[1]
            found[name] = (heading, field[2])
        elif line.startswith(" " * 8):
            found[name] = (heading, f"{found[name][1]} {line.strip()}")
    return found


def ungrouped(value: Any, config_type: type) -> Any:
    """A YAML file's configuration without its groups; a field of `GONE` may be given with the value that it has now."""
    if not isinstance(value, dict):
        return value
    flat = dict(value)
    for group in {heading for heading, _ in sections(config_type).values()}:
        if isinstance(inner := flat.get(group), dict):
            del flat[group]
            if twice := flat.keys() & inner.keys():
                raise ValueError(f"{group}.{min(twice)} is given twice, in its group and alone")
            flat |= inner
    gone = getattr(config_type, "GONE", {})
    return {key: item for key, item in flat.items() if key not in gone or item != gone[key]}


def as_parsed(argv: list[str], config_type: type, recipes: dict[str, Path]) -> list[str]:
    """The arguments as jsonargparse reads them: `--checkpoints.save_every 5` is `--save-every 5`, `--recipe NAME` is
    `--config FILE`, a bare switch is true, the words of a list become one, `["a","b"]`. Before the command's positional
    arguments a list takes one word only and does not swallow them. A word alone may be a flag's value (`WORD`).
    """
    hints = typing.get_type_hints(config_type)
    places = [field.name for field in dataclasses.fields(config_type) if is_positional(field)]
    several = any(is_list(hints[name]) for name in places)
    out: list[str] = []
    words: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").rpartition(".")[2].replace("-", "_")
        if name == "recipe":
            value = value if equals else rest.pop(0) if rest else ""
            if value not in recipes:
                near = difflib.get_close_matches(value, recipes, n=3, cutoff=0.3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                sys.exit(fail(f"recipe must be one of --list-recipes: recipe={value!r}{hint}", 2))
            out.append(f"--config={recipes[value]}")
        elif not flag.startswith("--"):
            words.append(argument)
        elif name not in hints or name in places:
            out.append(argument)
            if not equals and rest and not rest[0].startswith("--") and name not in ("help", "print_config"):
                out.append(rest.pop(0))
        else:
            most = 1 if len(words) < len(places) or several or not is_list(hints[name]) else len(rest)
            given = [value] if equals else []
            while not equals and len(given) < most and rest and not rest[0].startswith("--"):
                if hints[name] is bool and rest[0].lower() not in ("true", "false", "yes", "no"):
                    break
                given.append(rest.pop(0))
            if hints[name] is bool and not given:
                given = ["true"]
            elif is_list(hints[name]) and given and not given[0].startswith("["):
                given = [listed(given, hints[name])]
            flag = f"--{name.replace('_', '-')}"
            out += [f"{flag}={given[0]}"] if given else [flag]
    if words and (word := getattr(config_type, "WORD", "")):  # a field that has a flag, and needs none
        if any(argument.startswith(f"--{word}=") for argument in out):
            sys.exit(fail(f"{word} is given twice, by --{word} and as {words[0]!r}", 2))
        return [*out, f"--{word}={words[0]}", *words[1:]]
    if len(places) == 1 and is_list(hints[places[0]]) and words and not words[0].startswith("["):
        words = [listed(words, hints[places[0]])]
    return out + words


def listed(values: list[str], kind: Any) -> str:
    """The values as jsonargparse reads a list of this kind."""
    words = "int" not in str(kind) and "float" not in str(kind)
    return f"[{','.join(json.dumps(value) if words else value for value in values)}]"


def is_list(kind: Any) -> bool:
    """Whether a field is a list or a tuple (or None), and cannot be a single word."""
    parts = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    return all(part is type(None) or typing.get_origin(part) in (list, tuple) for part in parts)


def is_positional(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def bad_usage(message: str, flags: list[str]) -> str:
    """What the parser says, in one line: with key, value and rule, or with the flag that may have been meant."""
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
    return line.removeprefix("argument ")


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
    """What is wrong if one of our packages would be imported from a folder in front of ours on the path; else None."""
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


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 2]} …"


def fail(message: str, code: int) -> int:
    print(f"endprompt: {message}", file=sys.stderr)
    return code


def overview(commands: dict[str, EntryPoint]) -> tuple[argparse.ArgumentParser, Any]:
    """(the script's parser with a summary of each command, the commands' places in it): for its help and completion."""
    whole = argparse.ArgumentParser(
        "endprompt",
        description="Long-context extension by positional supervision: train, verify, score, draw.",
        epilog="endprompt COMMAND --help explains one.",
    )
    whole.add_argument("--version", action="version", version="", help="show the version and exit")
    places = whole.add_subparsers(title="commands", metavar="COMMAND")
    for name, entry in sorted(commands.items()):
        places.add_parser(name, help=summary(entry), add_help=False)
    return whole, places


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


@dataclass
class CompletionConfig:
    """Settings of `endprompt completion`.

    Args:
        shell: bash or zsh.
    """

    shell: Literal["bash", "zsh"]


@dataclass
class HelpConfig:
    """Settings of `endprompt help`.

    Args:
        command: name of a command.
    """

    command: str


EXIT_STATUS = """0    done
1    failed, with one line on stderr that names the key, the value and the rule
2    bad usage
130  interrupted, with the command that goes on"""

ENVIRONMENT = {
    "ENDPROMPT_TRACEBACK": "set: show the whole traceback of an error, as --debug does",
    "ENDPROMPT_CACHE": "folder of dequantised GGUF files; ~/.cache/endprompt if not set",
    "HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE": "the hub's own: its cache, its address, whether it is asked",
    "NO_COLOR": "set: no escape codes on a terminal either",
}


def manual(name: str) -> str:
    """A command's manual page. Raises ValueError with the nearest names if there is no such command."""
    commands = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=3)
        raise ValueError(f"unknown command: {name!r}; {f'did you mean {near[0]}?' if near else 'see endprompt --help'}")
    entry = commands[name]
    parser = command_parser(entry, entry.load())
    about, _, options = parser.format_help().partition("\n\n")[2].partition("\n\n")  # behind the usage
    parts = {"NAME": f"endprompt {name} - {summary(entry)}", "SYNOPSIS": parser.usage}
    parts |= {
        "DESCRIPTION": " ".join(about.split()).removeprefix(summary(entry)).strip(),
        "OPTIONS": options.strip(),
        "RECIPES": recipe_list(recipe_files(entry)),
    }
    parts |= {"EXIT STATUS": EXIT_STATUS, "ENVIRONMENT": "\n".join(f"{k}: {v}" for k, v in ENVIRONMENT.items())}

    def indented(head: str, text: str) -> str:
        """At most as wide as the terminal; what a line goes on with stands under its second column, if it has two."""
        if head == "OPTIONS":
            return textwrap.indent(text, "  ")
        lines = []
        for line in text.splitlines():
            column = re.match(r"\S+ {2,}", line)
            hang = " " * (4 + (len(column[0]) if column else 0 if head == "DESCRIPTION" else 4))
            width = shutil.get_terminal_size().columns - 2
            lines += textwrap.wrap(line, width, initial_indent=" " * 4, subsequent_indent=hang, break_on_hyphens=False)
        return "\n".join(lines)

    return "\n\n".join(f"{head}\n{indented(head, text)}" for head, text in parts.items() if text) + "\n"


def script(shell: str) -> str:
    """The script that completes commands and flags in a shell."""
    import shtab

    whole, places = overview({entry.name: entry for entry in entry_points(group=GROUP)})
    for entry in entry_points(group=GROUP):
        parser = places.choices[entry.name] = command_parser(entry, entry.load())
        for action in parser._actions:
            action.complete = shtab.FILE
    return shtab.complete(whole, shell)


if __name__ == "__main__":
    sys.exit(main())
