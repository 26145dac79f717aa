"""Graphs of steps on a capture that records and replays: every batch gives the eager tokens."""

import random
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.attention.backend import AttentionBackend
from nanovllm.engine.cuda_graph import Run, StepGraphs, chunk_sizes, decode_sizes
from nanovllm.engine.executor import SingleRankExecutor
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.step_inputs import StepShape


class Recorder:
    """Does what a CUDA graph does, on a CPU: computes again from the same addresses into the same output."""

    def __init__(self) -> None:
        self.replayed: list[int] = []  # sizes
        self.num_captured = 0

    def __call__(self, run: Run) -> Run:
        self.num_captured += 1
        output = run()

        def replay() -> Tensor:
            self.replayed.append(len(output))
            output.copy_(run())
            # Rows that nobody asked for must not hold what could reach the others.
            assert output.isfinite().all()
            return output

        return replay


def make_llm(folder: Path, **options: object) -> LLM:
    defaults: dict[str, object] = {"dtype": "float32", "device": "cpu", "max_model_len": 100, "num_kvcache_blocks": 400}
    return LLM(folder, **{**defaults, **options})


def runner_of(llm: LLM) -> ModelRunner:
    assert isinstance(llm.executor, SingleRankExecutor)
    assert llm.executor._runner is not None
    return llm.executor._runner


def test_sizes() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(5) == [1, 2, 4, 5]
    assert decode_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert decode_sizes(512) == [1, 2, 4, 8, *range(16, 513, 16)]
    assert decode_sizes(4000)[-1] == 512
    assert chunk_sizes(10) == [10]
    assert chunk_sizes(200) == [64, 128, 192, 200]
    assert chunk_sizes(1100) == [64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1100]
    assert len(chunk_sizes(16384)) == 28


@pytest.mark.parametrize("block_size", [16, 48])
def test_every_batch_size_gives_the_eager_tokens(checkpoint: Callable[..., Path], block_size: int) -> None:
    rng = random.Random(block_size)
    # They end one after the other, so that every size from 21 down to 1 is run, each right after a larger one; contexts
    # grow over the ends of blocks on the way. Then the same again, right after the smallest.
    prompts = [rng.choices(range(320), k=rng.randint(1, 70)) for _ in range(21)]
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=4 + i, ignore_eos=True) for i in range(len(prompts))
    ]
    tokens = []
    for recorder in (None, Recorder()):
        llm = make_llm(checkpoint(), max_num_seqs=21, kvcache_block_size=block_size)
        for cache in runner_of(llm).kv_cache:
            cache.fill_(torch.nan)
        if recorder is not None:
            runner_of(llm).capture_graphs(recorder)
        tokens.append([[o["token_ids"] for o in llm.generate(prompts, params, use_tqdm=False)] for _ in range(2)])
    assert tokens[0] == tokens[1]
    assert recorder is not None
    assert recorder.num_captured == len(decode_sizes(21))
    assert set(recorder.replayed) == {1, 2, 4, 8, 16, 21}


def test_chunks_run_eagerly_if_the_backend_cannot_capture_them(checkpoint: Callable[..., Path]) -> None:
    llm = make_llm(checkpoint(), max_num_seqs=4, max_num_batched_tokens=10)
    recorder = Recorder()
    runner_of(llm).capture_graphs(recorder)
    llm.add_request([1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True))
    llm.step()
    llm.step()
    assert recorder.replayed == [1]
    llm.add_request(list(range(30)), SamplingParams(max_tokens=9, ignore_eos=True))  # prefilled in four chunks
    for _ in range(4):
        llm.step()
    assert recorder.replayed == [1]
    llm.step()
    assert recorder.replayed == [1, 2]


@pytest.mark.parametrize("max_num_batched_tokens", [40, 150])  # of which one step is the largest captured, and two are
@pytest.mark.parametrize("block_size", [16, 48])
def test_chunks_beside_decodes_give_the_eager_tokens(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, block_size: int, max_num_batched_tokens: int
) -> None:
    monkeypatch.setattr(AttentionBackend, "CAN_CAPTURE_CHUNKS", True)
    rng = random.Random(block_size)
    shared = rng.choices(range(320), k=50)
    # More than may run at once, of all lengths, some behind a cached prefix: chunks and decodes in many mixtures.
    prompts = [shared[: 10 * rng.randint(0, 5)] + rng.choices(range(320), k=rng.randint(1, 49)) for _ in range(25)]
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=1 + i % 7, ignore_eos=True, prompt_logprobs=i % 2)
        for i in range(len(prompts))
    ]
    results = []
    for recorder in (None, Recorder()):
        sizes = {"max_num_seqs": 6, "max_num_batched_tokens": max_num_batched_tokens, "kvcache_block_size": block_size}
        llm = make_llm(checkpoint(), num_kvcache_blocks=9 if block_size == 48 else 20, **sizes)
        for cache in runner_of(llm).kv_cache:
            cache.fill_(torch.nan)
        if recorder is not None:
            runner_of(llm).capture_graphs(recorder)
            upload = Mock(wraps=runner_of(llm).input_buffer.upload)
            monkeypatch.setattr(runner_of(llm).input_buffer, "upload", upload)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append([(output["token_ids"], len(output["prompt_logprobs"] or ())) for output in outputs])
        results[-1].append(llm.scheduler.num_preemptions)
    assert results[0] == results[1]
    assert recorder is not None
    assert len(recorder.replayed) == upload.call_count, "every step has a graph"
    assert {size for size in recorder.replayed if size > 6} == set(chunk_sizes(max_num_batched_tokens))


def test_steps_of_one_token_are_all_decodes(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionBackend, "CAN_CAPTURE_CHUNKS", True)
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    tokens = []
    for recorder in (None, Recorder()):
        llm = make_llm(checkpoint(), max_num_seqs=6, max_num_batched_tokens=1)
        if recorder is not None:
            runner_of(llm).capture_graphs(recorder)
            assert recorder.num_captured == 1
        tokens.append([output["token_ids"] for output in llm.generate([[5, 6, 7], [8]], params, use_tqdm=False)])
    assert tokens[0] == tokens[1]


def make_graphs(max_seconds: float = 120.0) -> StepGraphs:
    decodes = [StepShape(size, size, 1, 1, 1) for size in (4, 2, 1)]
    chunks = [StepShape(size, 3, 1, size, size) for size in (8, 2)]
    return StepGraphs([*decodes, *chunks], lambda shape: lambda: torch.zeros(shape.num_tokens), lambda run: run, max_seconds)


def found_sizes(graphs: StepGraphs, is_decode: bool) -> list[int | None]:
    steps = [graphs.find(num_tokens, is_decode) for num_tokens in (1, 2, 3, 4, 5, 8, 9)]
    assert all(len(step.replay()) == step.shape.num_tokens for step in steps if step is not None)
    return [step and step.shape.num_tokens for step in steps]


def test_the_smallest_graph_that_holds_a_batch() -> None:
    assert found_sizes(make_graphs(), is_decode=True) == [1, 2, 4, 4, 8, 8, None]
    assert found_sizes(make_graphs(), is_decode=False) == [2, 2, 8, 8, 8, 8, None]


def test_capture_that_takes_too_long_keeps_the_first() -> None:
    graphs = make_graphs(max_seconds=-1.0)
    assert found_sizes(graphs, is_decode=True) == [4, 4, 4, 4, None, None, None]
    assert found_sizes(graphs, is_decode=False) == [None] * 7
