"""What docs/security.md promises: no code from data, nothing unpacked, no secret written down."""

from __future__ import annotations

import ast
import functools
import json
import pickle
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, TensorProperties

from endprompt import cli, train
from endprompt.files import file_sha256
from endprompt.model import load_model
from endprompt.train import states as checkpoint
from tests.support import ruler_helpers as helpers
from tests.support.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for package in cli.PACKAGES for path in (ROOT / package).rglob("*.py"))
#: Calls that run what they are given, or read what can.
NEVER = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads",
    "yaml.unsafe_load", "yaml.full_load", "shelve.open", "torch.hub.load", "tarfile.open", "shutil.unpack_archive",
}  # fmt: skip


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]


def calls(path: Path):
    """(dotted name, node) of every call in a file."""
    for node in nodes(path):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(node: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in node.keywords if k.arg == name), None)


def runs_data(path: Path, name: str, node: ast.Call) -> bool:
    if name in NEVER or name.endswith((".extractall", ".extract")):
        return True
    if name == "torch.load":
        return keyword(node, "weights_only") != "True"
    if name == "yaml.load":  # only with a SafeLoader
        loader = ast.unparse(node.args[1]) if len(node.args) > 1 else ""
        own = f"class {loader}(yaml.SafeLoader)" in path.read_text(encoding="utf-8")
        return not own and loader not in ("yaml.SafeLoader", "yaml.CSafeLoader")
    return any(keyword(node, key) not in (None, "False") for key in ("allow_pickle", "shell")) or (
        keyword(node, "trust_remote_code") == "True"
    )


def test_no_call_runs_what_data_say(tmp_path):
    assert len(SOURCES) > 80
    wrong = [
        f"{path}:{node.lineno} {name}" for path in SOURCES for name, node in calls(path) if runs_data(path, name, node)
    ]
    assert not wrong
    bad = tmp_path / "bad.py"
    bad.write_text("torch.load(f)\nyaml.load(f, Loader)\nnp.load(f, allow_pickle=True)\neval(x)\nz.extractall()\n")
    assert all(runs_data(bad, name, node) for name, node in calls(bad))


def test_trust_in_a_checkpoints_code_is_asked_for():
    from benchmarks.scoring import ScoreConfig

    assert ScoreConfig("c").trust_remote_code is False
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                names = [a.arg for a in node.args.kwonlyargs]
                if "trust_remote_code" in names:
                    assert ast.unparse(node.args.kw_defaults[names.index("trust_remote_code")]) == "False", path


def test_weights_in_a_pickle_are_refused(tmp_path):
    from safetensors.torch import load_file

    directory = make_checkpoint(tmp_path / "m")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the checkpoint does not load: .*safetensors"):
        load_model(directory)


def test_code_of_a_checkpoint_does_not_run_when_it_is_scored(tmp_path):
    """Its config, tokenizer and model all name a module that leaves a mark; asked for, the same module does run."""
    from benchmarks.scoring import ScoreConfig, score

    directory, mark = helpers.checkpoint(tmp_path / "m"), tmp_path / "ran"
    for name, change in (
        (
            "config.json",
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.A", "AutoModelForCausalLM": "mine.B"}},
        ),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["mine.Own", "mine.Own"]}}),
    ):
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (directory / "mine.py").write_text(f"open({str(mark)!r}, 'w').close()\nraise RuntimeError('ran')\n")
    out = {"lengths": "400", "samples": 1, "output": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=r"config\.json: transformers cannot read it"):
        score(ScoreConfig(str(directory), tasks="niah_single_1", **out))
    assert not mark.exists() and not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="ran"):
        score(ScoreConfig(str(directory), tasks="niah_single_1", trust_remote_code=True, **out))
    assert mark.exists()


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_training_state_that_would_run_code_is_refused(extend_config, tmp_path):
    config = extend_config(steps=4, save_every=2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        real = train.Trainer.save

        def save(self, states, beside):
            real(self, states)
            raise KeyboardInterrupt

        patch.setattr(train.Trainer, "save", save)
        train.extend(config)
    (state,) = checkpoint.states(Path(config.output + ".partial") / "states")
    index = state / ".metadata"
    checkpoint.check_index(index)  # as it was written it passes
    mark = tmp_path / "ran"
    index.write_bytes(pickle.dumps(Bomb(mark)))
    record = json.loads((state / "state.json").read_text())
    record["sha256"][".metadata"] = file_sha256(index)  # whoever changes the one can change the other
    (state / "state.json").write_text(json.dumps(record))
    config.resume = True
    with pytest.raises(
        ValueError, match=r"\.metadata: the state's index is not one that this program wrote: it names io\.open"
    ):
        train.extend(config)
    assert not mark.exists()


def test_index_names_no_attribute_of_an_allowed_module(tmp_path):
    """`torch.distributed.checkpoint.filesystem` imports os: its names must not lead there."""
    path = tmp_path / ".metadata"
    for module, name in (("torch.distributed.checkpoint.filesystem", "os.system"), ("os", "system"), ("torch", "load")):
        head = b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode()
        path.write_bytes(head + b"\x93.")
        with pytest.raises(ValueError, match="is not one that this program wrote"):
            checkpoint.check_index(path)


SECRETS = {
    "HF_TOKEN": "hf_sEcReT0123456789abcdefABCDEF",
    "HUGGING_FACE_HUB_TOKEN": "hf_sEcReT9876543210abcdefABCDEF",
    "WANDB_API_KEY": "sEcReTwandb0123456789",
    "AWS_SECRET_ACCESS_KEY": "sEcReTaws0123456789",
    "OPENAI_API_KEY": "sk-sEcReTopenai0123456789",
}


def test_secrets_of_the_environment_are_never_written(extend_config, tmp_path, monkeypatch, capsys):
    """A run that ends and one that fails: no file and no message holds a token."""
    config = extend_config(output=str(tmp_path / "run" / "out"), steps=2, save_every=1)
    flags = ["model", "output", "target", "prompt", "rows", "steps", "device", "save_every"]
    arguments = ["extend", *(f"--{key}={getattr(config, key)}" for key in flags), "--data", *config.data]
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert cli.main(arguments) == 0
    assert cli.main([*arguments, "--overwrite", "--lr=1e30", "--steps=30"]) == 1  # diverges
    monkeypatch.setenv("ENDPROMPT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="exists already") as raised:
        cli.main(arguments)
    told = capsys.readouterr()
    said = told.out + told.err + "".join(traceback.format_exception(raised.value))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"environment.json", "config.yaml", "endprompt.json", "log.jsonl"} <= {path.name for path in files}
    texts = [said.encode(), *(path.read_bytes() for path in files)]
    assert not [secret for secret in SECRETS.values() for text in texts if secret.encode() in text]
    assert not [path for path in files if b"sEcReT" in path.read_bytes()]


class Attribute:
    """Pickled as an attribute that is fetched by `getattr`: so Python 3.11.0 to 3.11.3 pickle the members of enums."""

    def __init__(self, of, name):
        self.found = of, name

    def __reduce__(self):
        return getattr, self.found


def test_an_index_may_fetch_members_of_its_own_enums_alone(tmp_path):
    index = tmp_path / ".metadata"
    index.write_bytes(pickle.dumps({"format": Attribute(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")}))
    checkpoint.check_index(index)
    for of, name in (
        (_MEM_FORMAT_ENCODING, "__class__"),
        (TensorProperties, "create_from_tensor"),
        (torch.Size, "numel"),
    ):
        index.write_bytes(pickle.dumps(Attribute(of, name)))
        with pytest.raises(ValueError, match=f"not one that this program wrote: it takes '{name}' of"):
            checkpoint.check_index(index)


def test_archive_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    import zipfile

    from benchmarks import longbench
    from benchmarks.longbench import sets

    with zipfile.ZipFile(tmp_path / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/qasper.jsonl", b" " * 100_000)
    monkeypatch.setattr(sets, "LARGEST", 50_000)
    with pytest.raises(ValueError, match=r"data\.zip, data/qasper\.jsonl: cannot be read \(it unpacks to 100000 bytes"):
        longbench.load_documents("qasper", tmp_path)


def audited(tmp_path, output, code=0, said=""):
    """The audit of packages with a stand-in for pip-audit; (exit code, stdout, stderr)."""
    program = tmp_path / "pip-audit"
    (tmp_path / "answer").write_text(output)
    program.write_text(f"#!/bin/sh\ncat '{tmp_path / 'answer'}'\n[ -z '{said}' ] || echo '{said}' >&2\nexit {code}\n")
    program.chmod(0o755)
    command = [sys.executable, str(ROOT / ".ci" / "audit_packages.py"), str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_an_audit_that_could_check_nothing_is_no_success(tmp_path):
    clean = {"name": "numpy", "version": "2.4.6", "vulns": []}
    fault = {"id": "PYSEC-1", "fix_versions": ["5.1"], "aliases": [], "description": "-"}
    bad = {"name": "pyyaml", "version": "5.0", "vulns": [fault]}
    unknown = {
        "name": "torch",
        "skip_reason": "not found on PyPI and could not be audited",
    }

    def of(*packages, **settings):
        return audited(tmp_path, json.dumps({"dependencies": packages, "fixes": []}), **settings)

    assert of(clean, unknown) == (
        0, "1 packages checked, 0 known vulnerabilities\n", "not checked, the service does not know them: torch\n"
    )  # fmt: skip
    code, out, _ = of(clean, bad, code=1)
    assert code == 1 and out.startswith("pyyaml 5.0: PYSEC-1, mended in 5.1\n2 packages checked, 1 known")
    code, out, err = of(unknown)
    assert code == 2 and out == "" and "torch" in err and "no package could be checked" in err
    code, out, err = audited(tmp_path, "", 1, "Connection refused")
    assert (code, out) == (2, "") and "gave no answer: Connection refused" in err
