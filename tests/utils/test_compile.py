"""The compiled sampler, on a compiler that counts: the same tokens, and nothing is compiled again as batch sizes change."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import fx

from nanovllm import LLM, SamplingParams
from nanovllm.engine.executor import SingleRankExecutor
from nanovllm.utils.compile import compile_sampler


class CountingCompiler:
    """Compiles nothing, and counts what it is asked to."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: fx.GraphModule, example_inputs: list[object]) -> Callable[..., object]:
        self.count += 1
        return graph.forward


def test_compiles_once_for_all_batch_sizes(checkpoint: Callable[..., Path]) -> None:
    torch._dynamo.reset()
    rng = random.Random(0)
    prompts = [rng.choices(range(320), k=5 * length) for length in range(1, 9)]
    # Greedy and not, so that both ways of the sampler see one row and many.
    params = [SamplingParams(temperature=i // 4, seed=i, max_tokens=2 + i % 4, ignore_eos=True) for i in range(8)]
    compiler = CountingCompiler()
    tokens = []
    for is_compiled in (False, True):
        options = {
            "dtype": "float32",
            "device": "cpu",
            "attention_backend": "torch_reference",
            "max_model_len": 100,
            "num_kvcache_blocks": 100,
        }
        llm = LLM(checkpoint(), **options)
        assert isinstance(llm.executor, SingleRankExecutor)
        assert llm.executor._runner is not None
        if is_compiled:
            compile_sampler(llm.executor._runner.sampler, compiler)
            for number in (2, 1):  # of rows
                for temperature in (0.0, 1.0):
                    first = SamplingParams(temperature=temperature, max_tokens=4, ignore_eos=True)
                    llm.generate([[1, 2, 3]] * number, first, use_tqdm=False)
            assert compiler.count > 0
        compiled_at_first = compiler.count
        tokens.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
        assert compiler.count == compiled_at_first
    assert tokens[0] == tokens[1]
    torch._dynamo.reset()
