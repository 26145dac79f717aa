"""Decoder layers in one call on a CPU: the same, bit for bit, as the layers one by one."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
import pytest
import torch
from kept_logits import check, run
from torch import Tensor

from nanovllm import LLM
from nanovllm.attention import cpu
from nanovllm.attention.cpu import CPUBackend
from nanovllm.engine.step_inputs import placeholder_inputs
from nanovllm.models import cpu_decoder
from nanovllm.models.llama import LlamaAttention
from nanovllm.models.qwen3 import Qwen3MLP, Qwen3Model
from nanovllm.utils.cpu_build import load_kernels

OPTIONS = {"device": "cpu", "attention_backend": "cpu", "max_model_len": 256, "num_kvcache_blocks": 100}
PROMPTS = [Random(i).choices(range(320), k=length) for i, length in enumerate((1, 90, 16, 33, 7))]
MODELS = [
    ("Qwen3ForCausalLM", {}),
    ("Qwen3ForCausalLM", {"attention_bias": True}),
    ("Qwen2ForCausalLM", {}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("MistralForCausalLM", {"head_dim": 32}),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of each call: (tokens, layers)."""
    made: list[tuple[int, int]] = []
    use_whole_layers = cpu.use_whole_layers

    class Kernels:
        def run_layers(self, hidden_states: Tensor, residual: Tensor | None, weights: Any, caches: Any, *step: Any) -> Any:
            made.append((len(hidden_states), len(caches)))
            return load_kernels().run_layers(hidden_states, residual, weights, caches, *step)

    monkeypatch.setattr(cpu, "use_whole_layers", lambda model, kernels, scale: use_whole_layers(model, Kernels(), scale))
    return made


def check_against_single_layers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]] = PROMPTS, **options: Any
) -> None:
    together = run(LLM(folder, **OPTIONS, **options), prompts)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "use_whole_layers", lambda *_: None)
        one_by_one = run(LLM(folder, **OPTIONS, **options), prompts)
    check(together, one_by_one, len(prompts))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("architecture", "shape"), MODELS)
def test_same_bits_as_layer_by_layer(
    checkpoint: Callable[..., Path],
    calls: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    shape: dict[str, Any],
    dtype: str,
) -> None:
    monkeypatch.setattr(cpu_decoder, "WORK", 60)
    folder = checkpoint(architecture, num_hidden_layers=5, **shape)
    check_against_single_layers(folder, monkeypatch, dtype=dtype, max_num_batched_tokens=50)
    assert {(50, 1), (5, 5)} < set(calls)


def test_same_bits_with_weights_that_onednn_packed(
    checkpoint: Callable[..., Path], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CPUBackend, "HAS_PRODUCTS", False)
    check_against_single_layers(checkpoint("Qwen2ForCausalLM"), monkeypatch, dtype="float32")
    assert calls


def test_all_layers_of_a_small_step_are_one_call_and_each_of_a_large_one_is_one(
    checkpoint: Callable[..., Path], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_decoder, "WORK", 10)
    model = LLM(checkpoint(num_hidden_layers=5), **OPTIONS, max_num_batched_tokens=20)
    run(model, [[1, 2, 3]])
    assert calls == [(3, 3), (3, 2), *[(1, 5)] * 5]
    calls.clear()
    run(model, [[*range(50, 62)]])
    assert calls[:5] == [(12, 1)] * 5


def test_steps_that_sample_nothing(
    checkpoint: Callable[..., Path], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [PROMPTS[1] + PROMPTS[3], PROMPTS[1] + PROMPTS[2]]  # which have more than a block in common
    check_against_single_layers(checkpoint(), monkeypatch, prompts, dtype="bfloat16", max_num_batched_tokens=40)
    assert [tokens for tokens, _ in calls[:3]] == [40, 40, 40]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("longest", [0, 30, 59])
def test_same_bits_of_decodes_that_two_threads_share(
    checkpoint: Callable[..., Path],
    calls: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
    longest: int,
    dtype: str,
) -> None:
    prompts = [Random(i).choices(range(320), k=1 + i % 40) for i in range(60)]
    prompts[longest] = Random(longest).choices(range(320), k=200)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check_against_single_layers(checkpoint(), monkeypatch, prompts, dtype=dtype)
    finally:
        torch.set_num_threads(num_threads)
    assert 60 in {tokens for tokens, _ in calls}


def test_last_layer_is_computed_for_outputs_only_but_stores_all(checkpoint: Callable[..., Path]) -> None:
    runner = cast(Any, LLM(checkpoint(), **OPTIONS, dtype="bfloat16").executor)._runner
    lengths = [5, 1, 40, 3]
    inputs = placeholder_inputs(lengths, 60, 2)
    inputs = inputs._replace(input_ids=np.arange(49), positions=np.arange(49) % 40, slot_mapping=np.arange(64, 113))
    inputs.block_tables[:] = [[2, 3]]

    def compute(outputs: list[int] | None) -> tuple[Tensor, list[Tensor]]:
        runner.kv_cache = [torch.full_like(cache, 0.5) for cache in runner.kv_cache]
        step = runner.input_buffer.upload(inputs)
        with torch.inference_mode():
            states = runner._forward(step, None if outputs is None else torch.tensor(outputs, dtype=torch.int64))
        return states, runner.kv_cache

    states, caches = compute(None)
    assert len(states) == 49
    for outputs in ([], [5], [4, 45], [4, 5, 45, 48]):
        some, same_caches = compute(outputs)
        assert torch.equal(some, states[outputs])
        assert all(map(torch.equal, caches, same_caches))
    with pytest.raises(RuntimeError, match="token 3 is an output, but not its sequence's last"):
        compute([3, 4])


class OwnMLP(Qwen3MLP):
    """Not what the C++ computes."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Nothing at all."""
        return torch.zeros_like(hidden_states)


def test_layers_of_another_kind_are_left_alone(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def decoder(**options: Any) -> Qwen3Model:
        llm: Any = LLM(checkpoint("LlamaForCausalLM"), **OPTIONS, **options)
        return llm.executor._runner.model.model

    def runs_layer_by_layer(model: Qwen3Model) -> bool:
        return type(model).run_layers is Qwen3Model.run_layers

    assert not runs_layer_by_layer(decoder())
    assert runs_layer_by_layer(decoder(batch_invariant=True))
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, x, *_: x, raising=False)
    assert runs_layer_by_layer(decoder())
    monkeypatch.undo()
    for part, other in (("mlp", OwnMLP), ("mlp.activation", torch.nn.GELU)):
        model = decoder()
        model.__class__ = Qwen3Model
        model.layers[1].get_submodule(part).__class__ = other
        cpu_decoder.use_whole_layers(model, load_kernels(), 1.0)
        assert runs_layer_by_layer(model)
