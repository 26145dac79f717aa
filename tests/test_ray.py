"""nanovllm.ray: rows in and out of the stage, and real Ray with two engines, one of which is killed."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.data.checkpoint import CheckpointConfig

from nanovllm import LLM, SamplingParams
from nanovllm.ray import OUTPUT_SCHEMA, NanoVLLMStage, generate

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_batch.py"
ENGINE: dict[str, Any] = {"max_model_len": 128, "num_kvcache_blocks": 64, "device": "cpu", "dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
CHAT = [{"role": "user", "content": "Who are you?"}]

# What the example is given: every fourth is a conversation, two cannot be run.
ROWS: list[dict[str, Any]] = [
    {"id": index, "prompt": None, "messages": CHAT}
    if index % 4 == 0
    else {"id": index, "prompt": {5: "", 7: "word " * 200}.get(index, f"Number {index}"), "messages": None}
    for index in range(260)
]


@pytest.fixture(scope="module")
def stage(tiny_text_model: Path) -> NanoVLLMStage:
    return NanoVLLMStage(tiny_text_model, GREEDY, **ENGINE)


def make_table(rows: list[dict[str, Any]]) -> pa.Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def run(stage: NanoVLLMStage, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return stage(make_table(rows)).to_pylist()


def texts(rows: list[dict[str, Any]]) -> dict[int, str]:
    return {row["id"]: row["generated_text"] for row in rows}


# ---- rows ----


def test_a_row_gets_what_generate_and_chat_say(stage: NanoVLLMStage, tiny_text_model: Path) -> None:
    batch = pa.table(
        {
            "id": pa.array([10, 11, 12], pa.int16()),
            "prompt": ["The sea", None, "A hill"],
            "messages": [None, CHAT, None],
            "sampling_params": [None, None, {"max_tokens": 3, "stop": None}],
        }
    )
    answered = stage(batch)
    assert answered.schema.equals(pa.schema([*batch.schema, *OUTPUT_SCHEMA]))
    assert answered.select(batch.column_names).equals(batch)
    with LLM(tiny_text_model, **ENGINE) as llm:
        expected = [
            *llm.generate("The sea", GREEDY, use_tqdm=False),
            *llm.chat(CHAT, GREEDY, use_tqdm=False),
            *llm.generate("A hill", SamplingParams(temperature=0.0, max_tokens=3), use_tqdm=False),
        ]
    for row, output in zip(answered.to_pylist(), expected, strict=True):
        assert row["generated_text"] == output["text"]
        assert row["generated_tokens"] == output["token_ids"]
        assert row["finish_reason"] == output["finish_reason"]
        assert row["num_prompt_tokens"] == output["num_prompt_tokens"]
        assert row["num_generated_tokens"] == len(output["token_ids"])
        assert row["error"] is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": None}, "has neither"),
        ({"prompt": "a", "messages": CHAT}, "has both"),
        ({"prompt": "word " * 200}, "the prompt has 20"),
        ({"prompt": 5}, "the prompt must be a str or a list of token ids, got int"),
        ({"prompt": [1, 10**6]}, "the prompt has token 1000000"),
        ({"prompt": [1, None]}, "it holds None"),
        ({"messages": []}, "the prompt is empty"),
        ({"messages": "Hello"}, "must be a list of messages"),
        ({"messages": [3, 4]}, "must be a list of messages"),
        ({"messages": [{"role": "user"}]}, "the chat template refuses the prompt"),
        ({"prompt": "a", "sampling_params": {"temperature": -1.0}}, "temperature must be"),
        ({"prompt": "a", "sampling_params": {"max_token": 3}}, "max_token"),
        ({"prompt": "a", "sampling_params": {"stop_token_ids": [10**6]}}, "stop_token_ids of the prompt"),
        ({"prompt": "a", "sampling_params": {"logit_bias": {"x": 1.0}}}, "'x'"),
        ({"prompt": "a", "sampling_params": {"n": 2, "temperature": 1.0}}, "n must be 1"),
        ({"prompt": "a", "sampling_params": {"logprobs": 2}}, "logprobs must be None"),
        ({"prompt": "a", "sampling_params": "hot"}, "'sampling_params' must be a struct, got str"),
    ],
)
def test_a_bad_row_says_why(stage: NanoVLLMStage, row: dict[str, Any], reason: str) -> None:
    (answered,) = run(stage, [row])
    assert reason in answered.pop("error")
    assert all(answered[name] is None for name in OUTPUT_SCHEMA.names if name != "error")


def test_bad_rows_leave_the_others_alone(stage: NanoVLLMStage) -> None:
    good = [{"id": index, "prompt": f"Number {index}", "sampling_params": None} for index in range(6)]
    bad = [
        {"id": 6, "prompt": "", "sampling_params": None},
        {"id": 7, "prompt": None, "sampling_params": None},
        {"id": 8, "prompt": "a", "sampling_params": {"top_p": 7.0}},
        {"id": 9, "prompt": "word " * 200, "sampling_params": None},
    ]
    mixed = [bad[0], good[0], bad[1], *good[1:4], bad[2], *good[4:], bad[3]]
    answered = run(stage, mixed)
    assert [row["id"] for row in answered] == [row["id"] for row in mixed]
    assert {row["id"] for row in answered if row["error"]} == {6, 7, 8, 9}
    assert texts([row for row in answered if not row["error"]]) == texts(run(stage, good))


def test_sampling_parameters_of_a_row_replace_those_of_all(stage: NanoVLLMStage) -> None:
    banned = run(stage, [{"prompt": [5, 6]}])[0]["generated_tokens"][0]
    rows: list[dict[str, Any]] = [
        {"prompt": [5, 6], "sampling_params": {"max_tokens": 2}},
        {"prompt": [5, 6], "sampling_params": {"logit_bias": {str(banned): -100.0}}},
        {"prompt": [5, 6], "sampling_params": {"stop_token_ids": [banned]}},
    ]
    short, other, stopped = run(stage, rows)
    assert short["num_generated_tokens"] == 2
    assert short["finish_reason"] == "length"
    assert other["generated_tokens"][0] != banned
    assert other["num_generated_tokens"] == GREEDY.max_tokens
    assert (stopped["generated_tokens"], stopped["finish_reason"]) == ([banned], "stop")


def test_columns_and_template_can_be_named(tiny_text_model: Path) -> None:
    stage = NanoVLLMStage(
        tiny_text_model,
        GREEDY,
        prompt_column="question",
        messages_column="chat",
        sampling_params_column="how",
        chat_template_args={"add_generation_prompt": False},
        **ENGINE,
    )
    rows = [{"question": "Hi", "prompt": 3}, {"chat": CHAT, "how": {"max_tokens": 1}}]
    text, chat = run(stage, rows)
    assert text["num_generated_tokens"] == GREEDY.max_tokens
    assert chat["num_generated_tokens"] == 1
    with LLM(tiny_text_model, **ENGINE) as llm:
        (expected,) = llm.chat(CHAT, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert chat["num_prompt_tokens"] == expected["num_prompt_tokens"]


def test_a_seed_makes_texts_a_function_of_the_rows(tiny_text_model: Path) -> None:
    params = SamplingParams(max_tokens=12)
    rows: list[dict[str, Any]] = [{"id": index, "prompt": "Once"} for index in range(6)]
    seeded = NanoVLLMStage(tiny_text_model, params, seed=1, **ENGINE)
    answers = texts(run(seeded, rows))
    assert len(set(answers.values())) == 6, "rows that differ in any column get texts of their own"
    split = [*run(seeded, rows[4:][::-1]), *run(seeded, [{**row, "messages": None} for row in rows[:4]])]
    assert texts(split) == answers, "whatever the batch, and what other rows of it have"
    assert texts(run(NanoVLLMStage(tiny_text_model, params, seed=2, **ENGINE), rows)) != answers
    unseeded = NanoVLLMStage(tiny_text_model, params, **ENGINE)
    assert texts(run(unseeded, rows)) != texts(run(unseeded, rows))


# ---- what is no row's fault ----


def test_what_no_row_can_help_is_raised(stage: NanoVLLMStage, tiny_text_model: Path) -> None:
    with pytest.raises(TypeError, match="batch_format='pyarrow'"):
        stage({"prompt": ["a"]})
    with pytest.raises(ValueError, match=r"no column 'prompt' or 'messages', but \['text'\]"):
        stage(pa.table({"text": ["a"]}))
    with pytest.raises(ValueError, match="column 'error' already"):
        stage(pa.table({"prompt": ["a"], "error": ["b"]}))
    with pytest.raises(ValueError, match="n must be 1 here, got 2"):
        NanoVLLMStage(tiny_text_model, SamplingParams(n=2))
    with pytest.raises(TypeError, match="sampling_params must be SamplingParams, got dict"):
        NanoVLLMStage(tiny_text_model, {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        NanoVLLMStage(tiny_text_model, seed=-1)


def test_an_engine_that_fails_raises_and_goes_on(stage: NanoVLLMStage, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "a"}, {"prompt": ""}]
    expected = run(stage, rows)
    with monkeypatch.context() as broken:
        broken.setattr(stage._llm.executor, "execute", lambda batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(stage, rows)
    assert run(stage, rows) == expected


def test_mistakes_are_found_before_any_actor_starts() -> None:
    dataset: Any = None
    with pytest.raises(TypeError, match="did you mean 'max_num_seqs'"):
        generate(dataset, "model", max_num_seq=3)
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        generate(dataset, "model", tensor_parallel_size=0, prompt_column="text")
    with pytest.raises(ValueError, match="logprobs must be None"):
        generate(dataset, "model", SamplingParams(logprobs=1))
    with pytest.raises(TypeError, match="seed must be an integer"):
        generate(dataset, "model", seed="7")


def test_the_example_leaves_alone_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ray_batch.py", "in.jsonl", str(tmp_path), "--model", "none"])
    with pytest.raises(SystemExit, match="is there already"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")


class AskedDataset:
    """Stands where a dataset would, and remembers what was asked of it."""

    def repartition(self, target_num_rows_per_block: int) -> "AskedDataset":
        self.rows_per_block = target_num_rows_per_block
        return self

    def map_batches(self, stage: type, **options: Any) -> "AskedDataset":
        self.stage, self.options = stage, options
        return self


def ask(monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], **options: Any) -> dict[str, Any]:
    """What `generate` asks of a cluster with these resources."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    dataset = AskedDataset()
    generate(dataset, "model", GREEDY, **options)  # type: ignore[arg-type]
    assert dataset.stage is NanoVLLMStage
    assert dataset.rows_per_block == dataset.options["batch_size"]
    return dataset.options


def test_engines_take_gpus_where_there_are_some(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    gpus = {"CPU": 32.0, "GPU": 8.0}
    asked = ask(monkeypatch, gpus, engines=4, tensor_parallel_size=2, seed=3)
    assert (asked["num_gpus"], asked["num_cpus"], asked["batch_size"]) == (2, None, 8 * 512)
    assert asked["fn_constructor_args"] == ("model", GREEDY)
    assert asked["fn_constructor_kwargs"] == {"device": "cuda", "tensor_parallel_size": 2, "seed": 3}
    assert asked["compute"] == ray.data.ActorPoolStrategy(size=4)
    asked = ask(monkeypatch, gpus, engines=(1, 16), gpus_per_engine=0.5, max_num_seqs=64)
    assert (asked["num_gpus"], asked["batch_size"]) == (0.5, 8 * 64)
    assert asked["compute"] == ray.data.ActorPoolStrategy(min_size=1, max_size=16)
    for resources, device in ((gpus, "cpu"), ({"CPU": 32.0}, "auto")):
        asked = ask(monkeypatch, resources, device=device, cpus_per_engine=8, batch_size=100)
        assert (asked["num_gpus"], asked["num_cpus"], asked["batch_size"]) == (0, 8, 100)
        assert asked["fn_constructor_kwargs"] == {"device": "cpu"}
    assert not caplog.records


def test_engines_that_take_all_cpus_are_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    ask(monkeypatch, {"CPU": 3.0}, engines=2)
    assert not caplog.records
    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "checkpoint_config", CheckpointConfig("id", str(tmp_path)))
    ask(monkeypatch, {"CPU": 3.0}, engines=2)
    assert "the engines take 2 of the cluster's 3 CPUs: Ray's own work needs 2" in caplog.text
    caplog.clear()
    monkeypatch.setattr(context, "checkpoint_config", None)
    ask(monkeypatch, {"CPU": 2.0}, engines=2)
    assert "Ray's own work needs 1" in caplog.text


def test_an_engine_has_a_thread_for_each_cpu(tiny_text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Actor:
        def get_actor_id(self) -> str:
            return "1"

        def get_assigned_resources(self) -> dict[str, float]:
            return {"CPU": 3.0}

    before = torch.get_num_threads()
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", Actor)
    try:
        NanoVLLMStage(tiny_text_model, **ENGINE)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_ray_is_needed_for_this_module_only() -> None:
    code = """
import sys
sys.modules["ray"] = None
import nanovllm
try:
    import nanovllm.ray
except ModuleNotFoundError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'nano-vllm[ray]'" in result.stdout


# ---- real Ray ----


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A Ray of our own; yields the environment of programs that join it. Nothing of it is left."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    folder = tempfile.mkdtemp(prefix="ray-")  # pytest's are too long for the names of sockets
    before = psutil.Process().children(recursive=True)  # of other tests in this process
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        context = ray.init(
            "local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield {**os.environ, "RAY_ADDRESS": context.address_info["address"]}
        children = psutil.Process().children(recursive=True)
        ray.shutdown()
    _, alive = psutil.wait_procs([child for child in children if child not in before], timeout=60)
    assert not alive
    shutil.rmtree(folder)
    ours = [f"_{process.pid}_" for process in children]  # as OpenMP names what a process shares
    left = [name for name in os.listdir("/dev/shm") if name.startswith("plasma") or any(one in name for one in ours)]
    assert not left


def start_example(
    cluster: dict[str, str], source: Path, output: Path, model: Path, *options: object
) -> subprocess.Popen[str]:
    engine = ["--batch-size", 10, "--max-model-len", 128, "--kvcache-memory-gb", 0.05]
    others = ["--max-tokens", 40, "--seed", 0, "--resume-by", "id", *options]
    command = [sys.executable, EXAMPLE, source, output, "--model", model, *engine, *others]
    return subprocess.Popen(
        [str(part) for part in command], env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(example: subprocess.Popen[str]) -> str:
    output, _ = example.communicate(timeout=240)
    assert example.returncode == 0, output
    return output


def wait_for(what: Callable[[], Any], example: subprocess.Popen[str]) -> Any:
    """The first true value of `what()`, while the example runs."""
    deadline = time.monotonic() + 240
    while not (value := what()):
        assert example.poll() is None, example.communicate()[0]
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
    return value


def actors() -> list[psutil.Process]:
    """The processes of engines that are answering a batch."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "NanoVLLMStage)).submit" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def check_output(folder: Path, rows: list[dict[str, Any]], tiny_text_model: Path) -> None:
    """Every row is there once, as one engine answers it."""
    written = sorted(pads.dataset(folder).to_table().to_pylist(), key=lambda row: row["id"])
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    stage = NanoVLLMStage(tiny_text_model, SamplingParams(max_tokens=40), seed=0, **ENGINE)
    assert written == run(stage, rows)


@pytest.fixture(scope="module")
def survived(cluster: dict[str, str], tiny_text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job wrote one of whose two engines was killed."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "in").mkdir()
    for part in range(2):
        pq.write_table(make_table(ROWS[part:240:2]), folder / "in" / f"{part}.parquet")
    example = start_example(cluster, folder / "in", folder / "out", tiny_text_model, "--engines", 2)
    victim = wait_for(actors, example)[0]
    time.sleep(0.5)  # some of its batches are done, others not
    victim.kill()
    assert "240 rows, 2 with an error" in finish(example)
    assert not victim.is_running()
    return folder / "out"


def test_a_killed_engine_costs_no_row(survived: Path, tiny_text_model: Path) -> None:
    check_output(survived, ROWS[:240], tiny_text_model)


def test_rows_that_were_written_are_not_done_again(
    cluster: dict[str, str], survived: Path, tiny_text_model: Path, tmp_path: Path
) -> None:
    before = {file: file.stat().st_mtime_ns for file in survived.iterdir()}
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert "260 rows, 2 with an error" in finish(start_example(cluster, tmp_path / "in.jsonl", survived, tiny_text_model))
    check_output(survived, ROWS, tiny_text_model)
    new = [file for file in survived.iterdir() if file not in before]
    assert sum(pq.read_metadata(file).num_rows for file in new) == 20
    assert all(file.stat().st_mtime_ns == when for file, when in before.items())
