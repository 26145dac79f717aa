"""Decode graphs on a capture that records and replays: every batch size gives the eager tokens."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.engine.cuda_graph import DecodeGraphs, Run, graph_sizes
from nanovllm.engine.executor import SingleRankExecutor
from nanovllm.engine.model_runner import ModelRunner


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
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert graph_sizes(512) == [1, 2, 4, 8, *range(16, 513, 16)]
    assert graph_sizes(4000)[-1] == 512


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
    assert recorder.num_captured == len(graph_sizes(21))
    assert set(recorder.replayed) == {1, 2, 4, 8, 16, 21}


def test_mixed_batches_run_eagerly(checkpoint: Callable[..., Path]) -> None:
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


def test_batches_larger_than_any_graph() -> None:
    graphs = DecodeGraphs([1, 2, 4], lambda size: lambda: torch.zeros(size), lambda run: run)
    assert [graphs.size_for(n) for n in range(1, 6)] == [1, 2, 4, 4, None]
    assert len(graphs.replay(4)) == 4


def test_capture_that_takes_too_long_keeps_the_largest() -> None:
    graphs = DecodeGraphs([1, 2, 4], lambda size: lambda: torch.zeros(size), lambda run: run, max_seconds=-1.0)
    assert [graphs.size_for(n) for n in range(1, 6)] == [4, 4, 4, 4, None]
