"""Several ranks give the tokens of one, for every family, whatever does not divide, and however the work is cut."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams

CheckpointFactory = Callable[..., Path]

ODD = {"vocab_size": 323, "intermediate_size": 98, "tie_word_embeddings": True}  # 4 ranks: both leave a rest
BIASES = {"attention_bias": True, "mlp_bias": True}
SHARED = random.Random(0).choices(range(320), k=50)
PROMPTS = [SHARED + random.Random(seed).choices(range(320), k=length) for seed, length in enumerate([40, 3, 25, 1])]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=30),
    SamplingParams(temperature=0.9, seed=1, max_tokens=40),
    SamplingParams(temperature=2.0, seed=2, max_tokens=20),
    SamplingParams(temperature=0.0, max_tokens=60),
]


def run(folder: Path, size: int, **options: object) -> tuple[list[list[int]], list[list[int]], int]:
    """The tokens of a first call, of a second, and the preemptions of both."""
    config: dict[str, object] = {"max_model_len": 160, "device": "cpu", "dtype": "float32", "tensor_parallel_size": size}
    with LLM(folder, **config, **options) as llm:
        first, second = ([output["token_ids"] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] for _ in range(2))
        return first, second, llm.scheduler.num_preemptions


@pytest.mark.parametrize(
    ("architecture", "size", "block_size", "num_blocks", "options"),
    [
        ("Qwen3ForCausalLM", 4, 48, 5, ODD),  # 2 K and V heads, each on two ranks
        ("Qwen2ForCausalLM", 2, 16, 11, {}),
        ("LlamaForCausalLM", 2, 32, 9, BIASES),
        ("MistralForCausalLM", 2, 16, 11, {"num_attention_heads": 6, "num_key_value_heads": 3}),  # 3 query heads, 2 to each
    ],
)
def test_ranks_give_the_tokens_of_one(
    checkpoint: CheckpointFactory,
    architecture: str,
    size: int,
    block_size: int,
    num_blocks: int,
    options: dict[str, object],
) -> None:
    folder = checkpoint(architecture, **options)
    plain = run(folder, 1, enable_prefix_caching=False, max_num_batched_tokens=1000)[0]
    first, second, num_preemptions = run(
        folder, size, kvcache_block_size=block_size, num_kvcache_blocks=num_blocks, max_num_batched_tokens=37
    )
    assert first == plain
    assert second == plain
    assert num_preemptions > 0
