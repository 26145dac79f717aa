"""`nanovllm batch` as a user meets it: what is in the output, exit codes, refusals, and a million rows in little memory."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_harness import ENGINE, Line, openai_row, read_lines, results, write_rows

from nanovllm import LLM, SamplingParams
from nanovllm.batch.job import BatchJob, BatchOptions
from nanovllm.batch.results import ResultFile
from nanovllm.cli import main

MESSAGES = [{"role": "user", "content": "Say something"}]

Batch = Callable[..., int]


@pytest.fixture
def batch(tiny_text_model: Path, tmp_path: Path) -> Batch:
    """Runs the command on rows, in this process; its exit code."""

    def run(rows: list[Any], *options: str, model: Path = tiny_text_model, output: str = "out.jsonl") -> int:
        path = write_rows(tmp_path / "in.jsonl", rows)
        argv = ["batch", path, tmp_path / output, "--model", model, *ENGINE, "--quiet", *options]
        return main([str(one) for one in argv])

    return run


def test_results_are_the_engines(batch: Batch, tmp_path: Path, tiny_text_model: Path) -> None:
    greedy = {"temperature": 0, "max_tokens": 5}
    rows = [
        openai_row("text", prompt="One two", **greedy, logprobs=2, prompt_logprobs=1),
        openai_row("chat", messages=MESSAGES, **greedy, logprobs=True, top_logprobs=1),
        {"prompt": "Three", "n": 2, "seed": 5, "max_tokens": 4},
        {"prompt": [5, 6, 7]},
    ]
    assert batch(rows, "--temperature", "0.5", "--max-tokens", "3") == 0
    found = results(tmp_path / "out.jsonl")
    with LLM(tiny_text_model, device="cpu", dtype="float32", num_kvcache_blocks=32, max_model_len=128) as llm:
        text, several = llm.generate(
            ["One two", "Three"],
            [
                SamplingParams(**greedy, logprobs=2, prompt_logprobs=1),
                SamplingParams(temperature=0.5, n=2, seed=5, max_tokens=4),
            ],
            use_tqdm=False,
        )
        (chat,) = llm.chat(MESSAGES, SamplingParams(**greedy, logprobs=1), use_tqdm=False)
    assert all(line["error"] is None and line["response"]["status_code"] == 200 for line in found.values())
    bodies = [found[f"batch_req_{number}"]["response"]["body"] for number in range(4)]
    assert [found[f"batch_req_{number}"]["custom_id"] for number in range(4)] == ["text", "chat", None, None]

    (choice,) = bodies[0]["choices"]
    assert (bodies[0]["object"], choice["text"], choice["finish_reason"]) == ("text_completion", text["text"], "length")
    assert "".join(choice["logprobs"]["tokens"]) == text["text"]
    assert choice["logprobs"]["text_offset"][-1] + len(choice["logprobs"]["tokens"][-1]) == len(text["text"])
    assert text["logprobs"] is not None
    assert choice["logprobs"]["token_logprobs"] == [position[0]["logprob"] for position in text["logprobs"]]
    assert [len(position) for position in choice["logprobs"]["top_logprobs"]] == [2] * 5
    assert len(bodies[0]["prompt_logprobs"]) == text["num_prompt_tokens"]

    (choice,) = bodies[1]["choices"]
    assert bodies[1]["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": chat["text"]}
    assert "".join(one["token"] for one in choice["logprobs"]["content"]) == chat["text"]
    assert [len(one["top_logprobs"]) for one in choice["logprobs"]["content"]] == [1] * 5

    assert [choice["text"] for choice in bodies[2]["choices"]] == [one["text"] for one in several["completions"]]
    assert [choice["index"] for choice in bodies[2]["choices"]] == [0, 1]
    usage = {"prompt_tokens": several["num_prompt_tokens"], "completion_tokens": 8}
    assert bodies[2]["usage"] == {**usage, "total_tokens": sum(usage.values())}
    assert bodies[3]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert {body["model"] for body in bodies} == {tiny_text_model.name}


def test_bad_rows_become_errors_and_the_others_run(batch: Batch, tmp_path: Path) -> None:
    rows = [
        {"custom_id": "a", "prompt": "Hello", "max_tokens": 2},
        "no JSON",
        "",
        {"custom_id": "a", "prompt": "again"},
        {"custom_id": "b", "prompt": "long " * 200},
        {"custom_id": "c", "prompt": ""},
        {"custom_id": "d", "prompt": "x", "temperature": "y" * 5000},
        {"custom_id": "\ud800", "prompt": "\ud800"},
        {"custom_id": 1, "prompt": [10**6]},
        {"custom_id": "1", "messages": [{"role": "user"}]},
        {"prompt": "Hello", "max_tokens": 2},
    ]
    assert batch(rows) == 3
    found = results(tmp_path / "out.jsonl")
    assert [f"batch_req_{number}" in found for number in range(11)] == [number != 2 for number in range(11)]
    errors = {number: found[f"batch_req_{number}"]["error"] for number in (1, 3, 4, 5, 6, 7, 8, 9)}
    assert [error["code"] for error in errors.values()] == ["invalid_json", "duplicate_custom_id", *["invalid_request"] * 6]
    assert "the row is not JSON" in errors[1]["message"]
    assert "custom_id 'a' is that of an earlier row" in errors[3]["message"]
    assert errors[4]["message"].startswith("the prompt has 20")
    assert "max_model_len=128" in errors[4]["message"]
    assert errors[5]["message"] == "the prompt is empty: it needs at least one token"
    assert len(errors[6]["message"]) == 1000
    assert found["batch_req_7"]["custom_id"] == "\ud800"
    assert "the vocabulary is 0 to 49151" in errors[8]["message"]
    assert "the chat template refuses the prompt" in errors[9]["message"]
    assert [found[f"batch_req_{number}"]["error"] for number in (0, 10)] == [None, None]


def test_what_has_changed_is_refused_unless_restarted(
    batch: Batch, tmp_path: Path, tiny_text_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [{"prompt": f"Row {i}", "max_tokens": 2} for i in range(3)]
    output = tmp_path / "out.jsonl"
    assert batch(rows) == 0
    content = output.read_bytes()
    other = shutil.copytree(tiny_text_model, tmp_path / "other")
    assert batch(rows, model=other) == 0  # the same model, elsewhere
    (other / "generation_config.json").write_text('{"eos_token_id": 5}')
    refused: list[tuple[list[Any], tuple[str, ...], dict[str, Path], str]] = [
        (rows, ("--temperature", "0.5"), {}, "temperature was 1.0 and is 0.5"),
        (rows, ("--seed", "5"), {}, "seed was 0 and is 5"),
        (rows, ("--max-tokens", "5"), {}, "max_tokens was None and is 5"),
        (rows, ("--template-args", '{"a": 1}'), {}, "template_args was {} and is {'a': 1}"),
        (rows, ("--max-model-len", "100"), {}, "max_model_len was 128 and is 100"),
        (rows[:2], (), {}, "the input has changed"),
        (rows, (), {"model": other}, "the model has changed"),
    ]
    for changed, options, model, message in refused:
        assert batch(changed, *options, **model) == 2
        assert message in capfd.readouterr().err
        assert output.read_bytes() == content
    assert batch(rows, "--max-num-seqs", "2", "--temperature", "1.0") == 0  # how fast, and what was so anyway
    assert output.read_bytes() == content
    assert batch(rows[:2], "--temperature", "0", "--restart") == 0
    assert len(read_lines(output)) == 2
    with output.open("a") as file:
        file.write('{"id":"x"}\n{"id":"y"}\n')
    assert batch(rows[:2], "--temperature", "0") == 2
    assert "line 3 of output" in capfd.readouterr().err


def test_usage_errors(
    batch: Batch, tmp_path: Path, tiny_text_model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(code: int, message: str) -> bool:
        return code == 2 and message in capfd.readouterr().err

    rows = [{"prompt": "x"}]
    (tmp_path / "mine.jsonl").write_text("precious\n")
    assert says(batch(rows, output="mine.jsonl"), "was not written by this command; --restart overwrites it")
    assert (tmp_path / "mine.jsonl").read_text() == "precious\n"
    assert says(batch(rows, output="in.jsonl"), "is the input")
    assert says(batch(rows, output="out.jsonl.gz"), "plain JSON Lines")
    assert says(batch(rows, output="none/out.jsonl"), "No such file")
    assert says(batch(rows, "--temperature", "-1"), "temperature must be")
    assert says(batch(rows, "--max-num-seqs", "0"), "max_num_seqs must be at least 1")
    assert says(batch(rows, model=tmp_path / "none"), "none does not exist")
    assert says(main(["batch", str(tmp_path / "nothing"), str(tmp_path / "o"), "--model", str(tiny_text_model)]), "No such")
    with pytest.raises(SystemExit) as caught:
        batch(rows, "--max-num-seqs", "many")
    assert caught.value.code == 2
    held = ResultFile(tmp_path / "held.jsonl")
    assert says(batch(rows, output="held.jsonl"), "being written by another run")
    held.close()


def test_everything_done_needs_no_model(batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "x", "max_tokens": 2}, "bad"]
    assert batch(rows) == 3
    content = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.delattr(BatchJob, "load")
    assert batch(rows) == 3
    assert (tmp_path / "out.jsonl").read_bytes() == content
    assert batch(rows, "--report", str(tmp_path / "none" / "report.html")) == 1
    assert batch([], output="empty.jsonl") == 0
    assert (tmp_path / "empty.jsonl").read_bytes() == b""


def test_progress_and_summary(
    tiny_text_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.batch.progress._REFRESH_SECONDS_OF_LOGS", 0.0)
    prefix = "the same words again and again and again and again and again and again " * 2
    rows: list[Line] = [{"prompt": f"{prefix}{i}", "max_tokens": 3, "temperature": 0} for i in range(30)]
    path = write_rows(tmp_path / "in.jsonl", [*rows, {"prompt": ""}])
    argv = ["batch", path, tmp_path / "out.jsonl", "--model", tiny_text_model, *ENGINE, "--max-num-seqs", "2"]
    assert main([str(one) for one in argv]) == 3
    shown = capfd.readouterr().err
    assert "31/31" in shown
    assert "tok/s" in shown
    assert "% cached, 1 errors" in shown
    assert "31 of 31 rows done, 1 of them with errors" in shown
    assert "90 out" in shown
    assert "invalid_request: 1, such as: the prompt is empty" in shown


BOUNDED = """
import resource, sys
from pathlib import Path
from unittest.mock import patch
sys.path.insert(0, ROOT)
from benchmarks.batch_overhead import NullExecutor
from nanovllm.batch.job import BatchJob, BatchOptions
from nanovllm.engine import llm_engine

def run(number):
    path = Path(FOLDER, f"{number}.jsonl")
    with path.open("w") as file:
        for i in range(number):
            file.write('{"custom_id": "request-%d", "prompt": [1, 2, %d], "max_tokens": 1}\\n' % (i, i % 300))
    job = BatchJob(BatchOptions(input=path, output=path.with_suffix(".out"), model=MODEL, engine={"max_num_seqs": 512}))
    with patch.object(llm_engine, "SingleRankExecutor", NullExecutor):
        assert job.run(job.prepare(job.load()))
    assert sum(1 for _ in open(path.with_suffix(".out"))) == number
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

few = run(20_000)
print(few, run(200_000))
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    """200,000 rows need no more than 20,000, but for one bit a row: what a process had at most can only grow."""
    values = {"ROOT": str(Path(__file__).parents[2]), "FOLDER": str(tmp_path), "MODEL": str(checkpoint(vocab_size=49152))}
    code = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()) + BOUNDED
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    few, many = map(float, ended.stdout.split())
    assert many - few < 8  # MiB, of some 400


def test_options_are_checked_before_anything_is_made(tmp_path: Path) -> None:
    for options in ({"engine": {"max_seqs": 3}}, {"sampling": {"temperature": -1}}, {"seed": -1}, {"seed": 0.5}):
        with pytest.raises((TypeError, ValueError)):
            BatchOptions(input=tmp_path / "in", output=tmp_path / "out", model="m", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
