"""The side-by-side timing of scoring, rehearsed small: same requests for both, every row there, an early end said."""

from __future__ import annotations

from benchmarks.speed import prompts
from endprompt import results


def test_both_models_answer_the_same_prompts_of_the_exact_length(tmp_path, monkeypatch):
    seen: list[list[int]] = []
    build = prompts.language_models

    def watched(model, tokenizer, *rest):
        made = build(model, tokenizer, *rest)
        for lm in made:
            inner = lm.generate_until

            def counted(jobs, inner=inner, **options):
                seen.append([len(tokenizer.encode(job.args[0])) for job in jobs])
                return inner(jobs, **options)

            lm.generate_until = counted
        return made

    monkeypatch.setattr(prompts, "language_models", watched)
    prompts.main(["--tiny", "--length", "200", "--samples", "3", "--output", str(tmp_path)])
    assert seen == [[170] * 2, [170], [170] * 2, [170] * 2, [170] * 2, [170], [170]]  # warm-ups, first tokens, turns
    made = {
        (r["task"], r["method"], r["metric"]): r
        for r in results.read_rows(tmp_path / "results.jsonl")
        if r["n"] in (None, 3)
    }
    ours, theirs = (made["scoring", name, "seconds"] for name in ("ours", "lm-eval"))
    assert made["scoring", "ours", "times_faster"]["value"] == theirs["value"] / ours["value"]
    assert made["scoring", "ours", "same_answers_percent"]["value"] == 100
    assert (ours["batch_size"], theirs["batch_size"]) == (32, 1)
    assert ours["environment"]["packages"]["lm_eval"]


def test_an_early_end_leaves_the_rows_known_so_far(tmp_path, capsys):
    prompts.main(["--tiny", "--length", "100", "--seconds", "0", "--output", str(tmp_path)])
    tasks = [r["task"] for r in results.read_rows(tmp_path / "results.jsonl")]
    assert tasks == ["matrix ceiling", "prompts", "prompts", "prompts"]
    assert "0 of 4 samples" in capsys.readouterr().err
