"""The wheel outside of the repository, and the common names of two packages."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

from endprompt import cli

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command, cwd: Path, **environment) -> subprocess.CompletedProcess:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ENDPROMPT"))}
    plain |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in environment.items()}}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, cwd=cwd, env=plain, capture_output=True, text=True, timeout=280)


# ------------------------------------------------------------------------------------------------- names that clash


@pytest.mark.parametrize(
    ("name", "kind"),
    [("analysis", "package"), ("benchmarks", "package"), ("paper_figures", "module"), ("analysis", "namespace")],
)
def test_package_of_the_same_name_in_front_is_said_and_not_run(name, kind, tmp_path):
    mark = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    if kind == "module":
        (tmp_path / f"{name}.py").write_text(mark)
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / ("__init__.py" if kind == "package" else "commands.py")).write_text(mark)
    (tmp_path / "elsewhere").mkdir()
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = run(sys.executable, "-m", "endprompt.cli", "audit", cwd=tmp_path / "elsewhere", PYTHONPATH=path)
    if kind == "namespace":  # a folder without __init__.py gives way to a package
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and done.stdout == ""
        assert f"the package '{name}' must be the one in {ROOT}, but Python finds {tmp_path}" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


def test_working_folder_with_a_package_of_the_same_name(tmp_path):
    """`python -m` puts the working folder first; -P, and the script, do not."""
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "__init__.py").write_text("raise SystemExit('not ours')\n")
    wrong = run(sys.executable, "-m", "endprompt.cli", "audit", cwd=tmp_path, PYTHONPATH=ROOT)
    assert wrong.returncode == 1 and "python -P -m endprompt.cli" in wrong.stderr
    right = run(sys.executable, "-P", "-m", "endprompt.cli", "audit", cwd=tmp_path, PYTHONPATH=ROOT)
    assert right.returncode == 0 and "does not follow" in right.stdout


def test_own_packages_are_no_strangers():
    assert cli.foreign_package() is None


# -------------------------------------------------------------------------------------------------------- the wheel


def test_every_import_is_a_stated_dependency():
    """What the packages import at the top or in a function is in the dependencies or an extra."""
    import ast
    from importlib.metadata import packages_distributions

    stated = {re.match(r"[\w-]+", need)[0].lower().replace("_", "-") for need in PROJECT["dependencies"]}
    for name, needs in PROJECT["optional-dependencies"].items():
        if name not in ("dev", "docs"):
            stated |= {re.match(r"[\w-]+", need)[0].lower() for need in needs}
    trackers = {"wandb", "tensorboard", "vllm"}  # asked for by the user's own flag, with the line that installs them
    of_package = packages_distributions()
    unstated = set()
    for package in cli.PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                for top in {name.partition(".")[0] for name in names}:
                    if top in sys.stdlib_module_names or top in (*cli.PACKAGES, *trackers):
                        continue
                    distributions = {d.lower().replace("_", "-") for d in of_package.get(top, [top])}
                    if not distributions & stated:
                        unstated.add(f"{path.relative_to(ROOT)} imports {top}")
    known_by_torch = {name for name in unstated if name.endswith((" triton", " huggingface_hub"))}
    assert unstated == known_by_torch


def test_no_dependency_is_stated_for_nothing():
    sources = "".join(p.read_text(encoding="utf-8") for package in cli.PACKAGES for p in (ROOT / package).rglob("*.py"))
    module_of = {"lm-eval": "lm_eval", "pyyaml": "yaml"}
    through_others = {"accelerate"}  # lm-eval's and transformers' loading needs it
    for need in PROJECT["dependencies"]:
        name = re.match(r"[\w-]+", need)[0]
        assert name in through_others or module_of.get(name, name) in sources, need


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from the files that git tracks."""
    folder = tmp_path_factory.mktemp("wheel")
    files = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    )
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = run(*pip, "-w", folder, folder / "source", cwd=folder)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_wheel_has_all_that_the_packages_have(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    tracked = subprocess.run(["git", "ls-files", *cli.PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    missing = set(tracked.stdout.split()) - inside
    assert not missing
    assert {f"{package}/py.typed" for package in cli.PACKAGES} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "docs/"))]


@pytest.mark.slow
def test_wheel_runs_outside_of_the_repository(wheel, tmp_path):
    """A fresh environment with this one's dependencies beside it; the demo with few steps."""
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(env)], check=True, timeout=120)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(env), "platbase": str(env)}))
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python, script = env / "bin" / "python", env / "bin" / "endprompt"
    work = tmp_path / "work"
    work.mkdir()
    done = run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=work)
    assert done.returncode == 0, done.stderr

    def endprompt(*arguments) -> str:
        done = run(script, *arguments, cwd=work)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(
        python, "-c", "import benchmarks, endprompt; print(benchmarks.__file__, endprompt.__file__)", cwd=work
    ).stdout
    assert where.count(str(own)) == 2, where
    assert endprompt("--version").strip() == PROJECT["version"]
    assert "Train: extend a checkpoint's window" in endprompt("--help")
    assert len(endprompt("extend", "--list-recipes").splitlines()) > 20
    assert "does not follow (15)" in endprompt("audit")
    assert Path(endprompt("tasks-path").strip(), "ruler", "vt.yaml").is_file()
    drawn = endprompt("figures").split()
    assert any(path.endswith("figure_3.png") for path in drawn) and all((work / path).is_file() for path in drawn)
    assert "EP_1" in endprompt("demo", "--steps=3", "--samples=2")
    rows = [json.loads(line) for line in (work / "runs" / "demo" / "results.jsonl").read_text().splitlines()]
    assert len({(row["method"], row["length"]) for row in rows if row["suite"] == "ruler"}) == 11
    environment = json.loads((work / "runs" / "demo" / "environment.json").read_text())
    assert environment["revision"] is None, "no repository of somebody else's is ours"


@pytest.mark.slow
def test_installed_inside_somebody_elses_repository_names_no_revision(wheel, tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("endprompt/") and name.endswith(".py"):
                (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "lib" / name).write_bytes(archive.read(name))
    code = "from endprompt.runs import git_revision, __file__ as f; print(f, git_revision())"
    done = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=tmp_path / "lib")
    assert str(tmp_path) in done.stdout and done.stdout.split()[-1] == "None", done.stdout + done.stderr
