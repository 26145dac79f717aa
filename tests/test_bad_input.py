"""What a user can get wrong is told clearly, before any work, and leaves the engine as it was.

One engine serves most tests here, so each also proves that the refusals before it left nothing behind.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nanovllm.utils.checkpoint
from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduled_batch import ScheduledBatch

CheckpointFactory = Callable[..., Path]

VOCAB_SIZE = 320
MAX_MODEL_LEN = 64
NUM_BLOCKS = 3  # of 16 tokens: less than MAX_MODEL_LEN, so that either limit can be met alone
GOOD = [5, 6, 7]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


def make_llm(folder: Path, **options: object) -> LLM:
    defaults: dict[str, object] = {
        "max_model_len": MAX_MODEL_LEN,
        "num_kvcache_blocks": NUM_BLOCKS,
        "kvcache_block_size": 16,
        "max_num_seqs": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    return LLM(folder, **{**defaults, **options})


class CheckedEngine:
    """An engine that counts its steps, and knows what it has to answer when all is well."""

    def __init__(self, folder: Path) -> None:
        self.llm = make_llm(folder)
        self.num_steps = 0
        self._execute = self.llm.executor.execute
        self.llm.executor.execute = self._count  # type: ignore[method-assign]
        self.expected = make_llm(folder).generate([GOOD], GREEDY, use_tqdm=False)[0]["token_ids"]

    def _count(self, batch: ScheduledBatch) -> list[int]:
        self.num_steps += 1
        return self._execute(batch)

    def assert_works(self) -> None:
        manager = self.llm.scheduler.block_manager
        assert self.llm.is_finished()
        assert manager.num_free_blocks == manager.num_blocks
        outputs = self.llm.generate([GOOD, GOOD], GREEDY, use_tqdm=False)
        assert [output["token_ids"] for output in outputs] == [self.expected] * 2
        assert self.llm.step() == ([], 0)


@pytest.fixture(scope="module")
def engine(checkpoint: CheckpointFactory) -> Iterator[CheckedEngine]:
    checked = CheckedEngine(checkpoint())
    yield checked
    checked.assert_works()


def assert_refused(
    engine: CheckedEngine,
    capfd: pytest.CaptureFixture[str],
    call: Callable[[], object],
    error: type[Exception],
    message: str,
) -> None:
    """The error comes before the first step and before anything is shown."""
    steps_before = engine.num_steps
    with pytest.raises(error, match=message) as caught:
        call()
    assert type(caught.value) is error
    assert engine.num_steps == steps_before
    assert "Generating" not in capfd.readouterr().err
    engine.assert_works()


# ---- prompts ----

BAD_PROMPTS: dict[str, tuple[object, type[Exception], str]] = {
    "empty": ([], ValueError, r"prompt {} is empty"),
    "empty_tuple": ((), ValueError, r"prompt {} is empty"),
    "max_model_len": ([1] * 64, ValueError, r"prompt {} has 64 tokens.*max_model_len=64.*at most 63"),
    "longer": ([1] * 65, ValueError, r"prompt {} has 65 tokens.*max_model_len=64"),
    "much_longer": ([1] * 10_000, ValueError, r"prompt {} has 10000 tokens.*max_model_len=64"),
    "more_than_the_cache": ([1] * 49, ValueError, r"prompt {} with 49 tokens and max_tokens=6 needs 4 KV blocks.*has 3\b"),
    "output_more_than_the_cache": ([1] * 44, ValueError, r"prompt {} with 44 tokens and max_tokens=6 needs 4 KV .*has 3\b"),
    "token_too_large": ([1, 320], ValueError, r"prompt {} has token 320.*0 to 319"),
    "token_far_too_large": ([2**70], ValueError, rf"prompt {{}} has token {2**70}.*0 to 319"),
    "token_negative": ([-1, 1], ValueError, r"prompt {} has token -1.*0 to 319"),
    "text_without_tokenizer": ("Hello", ValueError, r"prompt {} is text.*no tokenizer.*token ids"),
    "none": (None, TypeError, r"prompt {} must be a str or a list of token ids, got NoneType"),
    "int": (3, TypeError, r"prompt {} must be a str or a list of token ids, got int"),
    "float": (0.5, TypeError, r"prompt {} must be a str or a list of token ids, got float"),
    "dict": ({"prompt": "Hello"}, TypeError, r"prompt {} must be a str or a list of token ids, got dict"),
    "set": ({1, 2}, TypeError, r"prompt {} must be a str or a list of token ids, got set"),
    "bytes": (b"Hello", TypeError, r"prompt {} must be a str or a list of token ids, got bytes"),
    "array": (np.array([1, 2]), TypeError, r"prompt {} must be a str or a list of token ids, got ndarray"),
    "tensor": (torch.tensor([1, 2]), TypeError, r"prompt {} must be a str or a list of token ids, got Tensor"),
    "generator": ((i for i in (1, 2)), TypeError, r"prompt {} must be a str or a list of token ids, got generator"),
    "list_of_str": (["a", "b"], TypeError, r"prompt {} must be .*'a'"),
    "list_of_float": ([1, 2.0], TypeError, r"prompt {} must be .*2\.0"),
    "list_of_bool": ([1, True], TypeError, r"prompt {} must be .*True"),
    "list_of_none": ([None], TypeError, r"prompt {} must be .*None"),
    "list_of_lists": ([[1, 2]], TypeError, r"prompt {} must be .*\[1, 2\]"),
    "list_of_arrays": ([np.array([1])], TypeError, r"prompt {} must be .*array\(\[1\]\)"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_bad_prompt(engine: CheckedEngine, capfd: pytest.CaptureFixture[str], name: str, index: int) -> None:
    prompt, error, message = BAD_PROMPTS[name]
    prompts: list[Any] = [GOOD, GOOD, GOOD]
    prompts.insert(index, prompt)
    assert_refused(engine, capfd, lambda: engine.llm.generate(prompts, GREEDY), error, message.format(index))


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompt_of_add_request(engine: CheckedEngine, capfd: pytest.CaptureFixture[str], name: str) -> None:
    prompt: Any
    prompt, error, message = BAD_PROMPTS[name]
    assert_refused(engine, capfd, lambda: engine.llm.add_request(prompt, GREEDY), error, message.format(0))


def test_refused_request_leaves_those_of_add_request(engine: CheckedEngine) -> None:
    first = engine.llm.add_request(GOOD, GREEDY)
    engine.llm.step()
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.llm.add_request([], GREEDY)
    with pytest.raises(ValueError, match="prompt 0 has token 320"):
        engine.llm.add_request([320], GREEDY)
    second = engine.llm.add_request(GOOD, GREEDY)
    finished: dict[int, list[int]] = {}
    while not engine.llm.is_finished():
        finished.update(engine.llm.step()[0])
    assert finished == {first: engine.expected, second: engine.expected}


def test_the_first_of_several_bad_prompts_is_named(engine: CheckedEngine) -> None:
    with pytest.raises(ValueError, match="prompt 1 has token 999"):
        engine.llm.generate([GOOD, [999], [-5], [1000]], GREEDY, use_tqdm=False)


@pytest.mark.parametrize(
    ("prompts", "got"),
    [
        (None, "NoneType"),
        (3, "int"),
        ({"prompt": GOOD}, "dict"),
        (np.array([GOOD]), "ndarray"),
        (torch.tensor([GOOD]), "Tensor"),
        ((prompt for prompt in [GOOD]), "generator"),
    ],
)
def test_prompts_that_are_no_list(engine: CheckedEngine, capfd: pytest.CaptureFixture[str], prompts: Any, got: str) -> None:
    message = f"prompts must be a list.*got {got}"
    assert_refused(engine, capfd, lambda: engine.llm.generate(prompts, GREEDY), TypeError, message)


def test_one_list_of_token_ids_where_a_list_of_prompts_is_due(
    engine: CheckedEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts: Any = GOOD
    message = "prompt 0 must be a str or a list of token ids, got int"
    assert_refused(engine, capfd, lambda: engine.llm.generate(prompts, GREEDY), TypeError, message)


@pytest.mark.parametrize(
    "prompts",
    [
        (GOOD,),
        [tuple(GOOD)],
        [range(5, 8)],
        [[np.int64(5), np.int32(6), np.uint8(7)]],
        [[5, np.int64(6), 7]],
    ],
    ids=["tuple_of_lists", "tuple", "range", "numpy_ints", "mixed_ints"],
)
def test_other_sequences_of_token_ids_are_fine(engine: CheckedEngine, prompts: Any) -> None:
    (output,) = engine.llm.generate(prompts, GREEDY, use_tqdm=False)
    assert output["token_ids"] == engine.expected


def test_no_prompts_no_outputs(engine: CheckedEngine) -> None:
    steps_before = engine.num_steps
    assert engine.llm.generate([], GREEDY) == []
    assert engine.llm.generate([], []) == []
    assert engine.num_steps == steps_before


# ---- prompts that are text ----


@pytest.fixture(scope="module")
def text_engine(
    checkpoint: CheckpointFactory, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CheckedEngine]:
    """A tiny model with a real tokenizer."""
    folder = tmp_path_factory.mktemp("with_tokenizer") / "model"
    shutil.copytree(checkpoint(vocab_size=49152), folder)
    for file in smollm2.glob("tokenizer*"):
        shutil.copy(file, folder)
    checked = CheckedEngine(folder)
    yield checked
    checked.assert_works()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt {} is empty"),
        ("one two three four " * 20, "prompt {} has 8[0-9] tokens.*max_model_len=64"),
        ("\ud800", "prompt {}"),  # half of a surrogate pair: no tokenizer can encode it
    ],
    ids=["empty", "long", "surrogate"],
)
@pytest.mark.parametrize("index", [0, 2])
def test_bad_text(
    text_engine: CheckedEngine, capfd: pytest.CaptureFixture[str], prompt: str, message: str, index: int
) -> None:
    prompts: list[Any] = ["A good one", GOOD]
    prompts.insert(index, prompt)
    message = message.format(index)
    assert_refused(text_engine, capfd, lambda: text_engine.llm.generate(prompts, GREEDY), ValueError, message)


def test_text_whose_tokens_the_model_does_not_know(checkpoint: CheckpointFactory, smollm2: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint(), tmp_path / "model")  # 320 embeddings for a tokenizer of 49152
    for file in smollm2.glob("tokenizer*"):
        shutil.copy(file, folder)
    with pytest.raises(ValueError, match=r"prompt 1 has token [0-9]+; the vocabulary is 0 to 319"):
        make_llm(folder).generate([GOOD, "Hello"], GREEDY, use_tqdm=False)


# ---- sampling params ----


@pytest.mark.parametrize("num_params", [0, 1, 2, 4])
def test_lists_of_different_length(engine: CheckedEngine, capfd: pytest.CaptureFixture[str], num_params: int) -> None:
    message = f"3 prompts but {num_params} sampling_params"
    params = [GREEDY] * num_params
    assert_refused(engine, capfd, lambda: engine.llm.generate([GOOD] * 3, params), ValueError, message)


@pytest.mark.parametrize("wrong", [None, 0.5, {"temperature": 0.5}, SamplingParams, "greedy"])
@pytest.mark.parametrize("index", [0, 2])
def test_list_with_something_else_than_sampling_params(
    engine: CheckedEngine, capfd: pytest.CaptureFixture[str], wrong: object, index: int
) -> None:
    params: list[Any] = [GREEDY, GREEDY]
    params.insert(index, wrong)
    message = f"sampling_params of prompt {index} must be SamplingParams, got {type(wrong).__name__}"
    assert_refused(engine, capfd, lambda: engine.llm.generate([GOOD] * 3, params), TypeError, message)


@pytest.mark.parametrize("wrong", [0.5, {"temperature": 0.5}, SamplingParams, 7, {GREEDY}])
def test_sampling_params_of_wrong_type(engine: CheckedEngine, capfd: pytest.CaptureFixture[str], wrong: Any) -> None:
    message = f"sampling_params must be SamplingParams or a list.*got {type(wrong).__name__}"
    assert_refused(engine, capfd, lambda: engine.llm.generate([GOOD], wrong), TypeError, message)


@pytest.mark.parametrize("wrong", [None, 0.5, {"temperature": 0.5}, [GREEDY]])
def test_sampling_params_of_add_request_of_wrong_type(
    engine: CheckedEngine, capfd: pytest.CaptureFixture[str], wrong: Any
) -> None:
    message = f"must be SamplingParams, got {type(wrong).__name__}"
    assert_refused(engine, capfd, lambda: engine.llm.add_request(GOOD, wrong), TypeError, message)


def test_params_may_be_a_tuple_or_left_out(engine: CheckedEngine) -> None:
    outputs = engine.llm.generate([GOOD, GOOD], (GREEDY, GREEDY), use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [engine.expected] * 2
    with pytest.raises(ValueError, match="max_tokens=64 needs 4 KV blocks"):  # the default
        engine.llm.generate([GOOD], use_tqdm=False)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": -1}, ValueError, "max_tokens must be at least 1, got -1"),
        ({"max_tokens": 1.5}, TypeError, "max_tokens must be an integer, got 1.5"),
        ({"max_tokens": "3"}, TypeError, "max_tokens must be an integer, got '3'"),
        ({"max_tokens": True}, TypeError, "max_tokens must be an integer, got True"),
        ({"max_tokens": None}, TypeError, "max_tokens must be an integer, got None"),
        ({"temperature": -0.1}, ValueError, r"temperature must be .*at least 0.*got -0\.1"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite.*got nan"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite.*got inf"),
        ({"temperature": -math.inf}, ValueError, "temperature must be finite.*got -inf"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"temperature": True}, TypeError, "temperature must be a number, got True"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos must be True or False, got 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, ValueError, f"seed must be at most {2**63 - 1}, got {2**63}"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"seed": False}, TypeError, "seed must be an integer, got False"),
    ],
)
def test_bad_value_in_sampling_params(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize("temperature", [0, 1, 0.0, 1e-30, 1e-4, 1e30, np.float32(0.5)])
def test_extreme_temperatures_run(engine: CheckedEngine, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=5, seed=1)
    (output,) = engine.llm.generate([GOOD], params, use_tqdm=False)
    assert len(output["token_ids"]) == 5
    if temperature <= 1e-4:  # the others have no chance against the largest logit
        assert output["token_ids"] == engine.expected[:5]


# ---- the wrong moment ----


def test_generate_while_requests_are_unfinished(engine: CheckedEngine) -> None:
    seq_id = engine.llm.add_request(GOOD, GREEDY)
    for _ in range(3):
        steps_before = engine.num_steps
        with pytest.raises(RuntimeError, match=r"unfinished.*step\(\)"):
            engine.llm.generate([GOOD], GREEDY, use_tqdm=False)
        assert engine.num_steps == steps_before
        engine.llm.step()
    finished: list[tuple[int, list[int]]] = []
    while not engine.llm.is_finished():
        finished += engine.llm.step()[0]
    assert finished == [(seq_id, engine.expected)]


# ---- the limits themselves ----


@pytest.mark.parametrize("prompt_length", [1, 40, 61, 62, 63])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 64, 10**12])
def test_output_is_cut_at_max_model_len(checkpoint: CheckpointFactory, prompt_length: int, max_tokens: int) -> None:
    llm = make_llm(checkpoint(), num_kvcache_blocks=4)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    (output,) = llm.generate([[9] * prompt_length], params, use_tqdm=False)
    assert output["finish_reason"] == "length"
    assert prompt_length + len(output["token_ids"]) == min(prompt_length + max_tokens, MAX_MODEL_LEN)
    assert output["num_prompt_tokens"] == prompt_length
    assert llm.is_finished()


def test_longest_outputs_in_a_batch(checkpoint: CheckpointFactory) -> None:
    # At max_model_len a sequence has no place for one more token; its neighbours go on.
    llm = make_llm(checkpoint(), num_kvcache_blocks=12)
    params = SamplingParams(temperature=0.0, max_tokens=1000)
    lengths = [63, 60, 1, 50]
    outputs = llm.generate([[9] * length for length in lengths], params, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [64 - length for length in lengths]
    for length, output in zip(lengths, outputs, strict=True):
        (alone,) = llm.generate([[9] * length], params, use_tqdm=False)
        assert output["token_ids"] == alone["token_ids"]
        assert output["finish_reason"] == "length"


@pytest.mark.parametrize("prompt_length", [1, 33, 47, 48])
def test_request_that_just_fits_the_cache(engine: CheckedEngine, prompt_length: int) -> None:
    # The last token is sampled but never computed: 49 tokens in all need 48 places.
    prompt = [9] * prompt_length
    fitting = SamplingParams(temperature=0.0, max_tokens=49 - prompt_length)
    (output,) = engine.llm.generate([prompt], fitting, use_tqdm=False)
    assert len(output["token_ids"]) == 49 - prompt_length
    too_long = SamplingParams(temperature=0.0, max_tokens=50 - prompt_length)
    with pytest.raises(ValueError, match=rf"prompt 0 with {prompt_length} tokens.*needs 4 KV blocks of 16 .*has 3\b"):
        engine.llm.generate([prompt], too_long, use_tqdm=False)


# ---- LLM's keywords ----


@pytest.mark.parametrize(
    ("keyword", "nearest"),
    [
        ("max_model_length", "max_model_len"),
        ("max_len", "max_model_len"),
        ("block_size", "kvcache_block_size"),
        ("num_kv_blocks", "num_kvcache_blocks"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("Device", "device"),
        ("zzz", ""),  # nothing is near, something is named
    ],
)
def test_unknown_keyword(checkpoint: CheckpointFactory, keyword: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=rf"unknown keyword '{keyword}'.*did you mean '{nearest}"):
        LLM(checkpoint(), **{keyword: 1})


def test_unknown_keyword_comes_before_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unknown keyword 'max_length'"):
        LLM(tmp_path / "missing", max_length=1)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_kvcache_blocks": 0}, ValueError, "num_kvcache_blocks must be at least 1, got 0"),
        ({"num_kvcache_blocks": -1}, ValueError, "num_kvcache_blocks must be at least 1, got -1"),
        ({"num_kvcache_blocks": 2.5}, TypeError, "num_kvcache_blocks must be an integer, got 2.5"),
        ({"max_model_len": 0}, ValueError, "max_model_len must be at least 1, got 0"),
        ({"max_model_len": "4096"}, TypeError, "max_model_len must be an integer, got '4096'"),
        ({"max_num_seqs": 0}, ValueError, "max_num_seqs must be at least 1, got 0"),
        ({"max_num_seqs": None}, TypeError, "max_num_seqs must be an integer, got None"),
        ({"max_num_batched_tokens": 0}, ValueError, "max_num_batched_tokens must be at least 1, got 0"),
        ({"kvcache_block_size": 0}, ValueError, "kvcache_block_size must be at least 1, got 0"),
        ({"kvcache_block_size": 24}, ValueError, "kvcache_block_size must be a multiple of 16, got 24"),
        ({"tensor_parallel_size": 0}, ValueError, "tensor_parallel_size must be at least 1, got 0"),
        ({"gpu_memory_utilization": 0}, ValueError, "gpu_memory_utilization must be above 0.*got 0"),
        ({"gpu_memory_utilization": 1.01}, ValueError, r"gpu_memory_utilization must be .*at most 1.*got 1\.01"),
        ({"gpu_memory_utilization": math.nan}, ValueError, "gpu_memory_utilization .*got nan"),
        ({"gpu_memory_utilization": "0.9"}, TypeError, "gpu_memory_utilization must be a number, got '0.9'"),
        ({"kvcache_memory_gb": 0}, ValueError, "kvcache_memory_gb must be above 0 .*, got 0"),
        ({"kvcache_memory_gb": -1.0}, ValueError, r"kvcache_memory_gb must be above 0 .*, got -1\.0"),
        ({"kvcache_memory_gb": math.inf}, ValueError, "kvcache_memory_gb .*got inf"),
        (
            {"kvcache_memory_gb": 1e-9, "num_kvcache_blocks": None},
            ValueError,
            "no memory for the KV cache.*kvcache_memory_gb",
        ),
        ({"device": "tpu"}, ValueError, "device must be .*got 'tpu'"),
        ({"device": "cuda"}, ValueError, "device='cuda'.*no GPU"),
        ({"dtype": "int8"}, ValueError, "dtype must be .*got 'int8'"),
        ({"dtype": torch.int8}, ValueError, r"dtype must be .*got torch\.int8"),
        ({"attention_backend": "magic"}, ValueError, "attention_backend must be .*torch_reference.*got 'magic'"),
        ({"enforce_eager": "yes"}, TypeError, "enforce_eager must be True or False, got 'yes'"),
        ({"enable_prefix_caching": 1}, TypeError, "enable_prefix_caching must be True or False, got 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_bad_value_of_keyword(
    checkpoint: CheckpointFactory,
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        make_llm(checkpoint(), **values)


def test_config_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        GREEDY.max_tokens = 7  # type: ignore[misc]


# ---- checkpoints ----


@pytest.fixture
def folder(checkpoint: CheckpointFactory, tmp_path: Path) -> Path:
    """A checkpoint to spoil."""
    return shutil.copytree(checkpoint(), tmp_path / "model")


def test_options_are_refused_before_weights_are_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="attention_backend must be"):
        make_llm(folder, attention_backend="magic")


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_folder_that_is_missing(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(missing))} does not exist.*folder"):
        LLM(missing)
    with pytest.raises(FileNotFoundError, match=r"~/no/such folder|does not exist"):
        LLM("~/no/such folder")


def test_gguf_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.gguf does not exist"):
        LLM(tmp_path / "model.gguf")


def test_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"weights")
    with pytest.raises(FileNotFoundError, match=r"model\.bin is a file"):
        LLM(path)


def test_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(nanovllm.utils.checkpoint, "snapshot_download", no_network)
    with pytest.raises(FileNotFoundError, match=r"'someone/some-model'.*no network.*hf download someone/some-model"):
        LLM("someone/some-model")


@pytest.mark.parametrize("model", [None, 3, ["model"]])
def test_model_of_wrong_type(model: Any) -> None:
    with pytest.raises(TypeError):
        LLM(model)


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(folder))} has no config.json"):
        LLM(folder)


def test_folder_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, which is never opened")
    with pytest.raises(FileNotFoundError, match=rf"{re.escape(str(folder))} has no \*\.safetensors"):
        make_llm(folder)


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        make_llm(folder)


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "NoSuchModel"])
def test_unsupported_architecture(folder: Path, architecture: str) -> None:
    edit_config(folder, architectures=[architecture], model_type="no_such_type")
    with pytest.raises(ValueError, match=rf"config\.json: architecture '{architecture}' is not supported.*Qwen3ForCausalLM"):
        make_llm(folder)


@pytest.mark.parametrize("architectures", [None, []])
def test_config_without_architecture(folder: Path, architectures: object) -> None:
    edit_config(folder, architectures=architectures)
    with pytest.raises(ValueError, match=r"config\.json: architecture .*not supported"):
        make_llm(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"architectures": 3}'])
def test_config_that_is_no_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        make_llm(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"eos_token_id": "two"}'])
def test_generation_config_that_is_no_config(folder: Path, content: bytes) -> None:
    (folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        make_llm(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe"])
def test_weight_index_that_is_no_index(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        make_llm(folder)


def test_failed_start_leaves_nothing_that_disturbs_the_next(folder: Path, checkpoint: CheckpointFactory) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        make_llm(folder)
    llm = make_llm(checkpoint())
    assert len(llm.generate([GOOD], GREEDY, use_tqdm=False)[0]["token_ids"]) == 6
