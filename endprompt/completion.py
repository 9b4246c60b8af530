"""Shell completion: one script from the commands' own entry points and the fields of their settings."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Literal

from endprompt import cli

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
    flags = {ep.name: command_flags(ep) for ep in sorted(entry_points(group=cli.GROUP), key=lambda ep: ep.name)}
    cases = "\n".join(f'        {name}) flags="{" ".join(own)}" ;;' for name, own in flags.items())
    made = SCRIPT.format(commands=" ".join(flags), cases=cases)
    return ZSH + made if shell == "zsh" else made


def command_flags(entry_point: typing.Any) -> list[str]:
    """The flags of a command, as its help has them."""
    config = typing.get_type_hints(entry_point.load())["config"]
    own = [field.name for field in dataclasses.fields(config) if not cli.is_positional(field)]
    recipes = ["recipe", "list-recipes"] if cli.recipe_files(entry_point) else []
    return [f"--{name.replace('_', '-')}" for name in ["help", "config", "debug", *recipes, *own]] + ["--print_config"]
