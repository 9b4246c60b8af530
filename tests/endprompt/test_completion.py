"""The completion script in a real bash: what Tab offers is what the script takes."""

import dataclasses
import shutil
import subprocess

import pytest

from endprompt import cli
from endprompt.config import ExtendConfig


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """`bash(words)`: what bash offers for the last of the words."""
    path = tmp_path_factory.mktemp("completion") / "endprompt.bash"
    path.write_text(cli.script("bash"))

    def complete(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        code = f"source {path}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        code += "_shtab_endprompt '' \"${COMP_WORDS[-1]}\"; echo ${COMPREPLY[@]}"
        done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return set(done.stdout.split())

    return complete


def test_commands_are_offered(bash):
    assert bash("endprompt", "") == {ep.name for ep in cli.entry_points(group=cli.GROUP)}
    assert bash("endprompt", "ext") == {"extend"}


def test_flags_of_the_command_are_offered(bash):
    every = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ExtendConfig)}
    own = {"--help", "--config", "--debug", "--recipe", "--list-recipes", "--print_config"}
    assert bash("endprompt", "extend", "--") == every | own
    assert bash("endprompt", "extend", "--tar") == {"--target"}
    assert bash("endprompt", "positions", "--recipe") == set()
    assert "--checkpoint" not in bash("endprompt", "verify", "--")  # given by its place
    assert bash("endprompt", "extend", "--model", "check") == set()  # left to bash: files


def test_script_is_sound_in_zsh(tmp_path):
    text = cli.script("zsh")
    assert text.startswith("#compdef endprompt") and "--weight-decay" in text
    zsh = shutil.which("zsh")
    if zsh:
        (tmp_path / "script.zsh").write_text(text)
        subprocess.run([zsh, "-n", str(tmp_path / "script.zsh")], check=True)


def test_unknown_shell_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["completion", "fish"])
    assert raised.value.code == 2 and "bash" in capsys.readouterr().err
