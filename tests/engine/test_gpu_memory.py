"""How much of a GPU the KV cache gets: a pure function of what was measured; and the step that is measured."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from nanovllm import LLM
from nanovllm.engine.executor import SingleRankExecutor
from nanovllm.engine.input_buffer import StepTensors
from nanovllm.engine.kv_cache import GIB, GpuMemory, gpu_kv_cache_bytes
from nanovllm.engine.model_runner import ModelRunner


def test_a_card_of_ones_own() -> None:
    # 24 GiB; 2 GiB of weights held, 1 GiB more in the largest step.
    memory = GpuMemory(total=24 * GIB, free=22 * GIB, held=2 * GIB, peak=3 * GIB)
    assert gpu_kv_cache_bytes(memory, 1.0) == 21 * GIB
    assert gpu_kv_cache_bytes(memory, 0.5) == 9 * GIB


def test_what_others_hold_is_counted_once() -> None:
    memory = GpuMemory(total=24 * GIB, free=17 * GIB, held=2 * GIB, peak=3 * GIB)  # 5 GiB are not ours
    assert gpu_kv_cache_bytes(memory, 1.0) == 16 * GIB
    # Whatever our allocator still holds of the step, the answer is the same.
    assert gpu_kv_cache_bytes(GpuMemory(24 * GIB, 16 * GIB, 3 * GIB, 3 * GIB), 1.0) == 16 * GIB


def test_what_captured_steps_keep_is_counted_beside_the_largest_step() -> None:
    memory = GpuMemory(total=24 * GIB, free=22 * GIB, held=2 * GIB, peak=3 * GIB, captured=GIB)
    assert gpu_kv_cache_bytes(memory, 1.0) == 20 * GIB


def test_the_share_is_never_exceeded() -> None:
    for utilization in (0.3, 0.55, 0.9, 1.0):
        memory = GpuMemory(total=80 * GIB + 1, free=71 * GIB, held=6 * GIB, peak=9 * GIB)
        others = memory.total - memory.free - memory.held
        assert gpu_kv_cache_bytes(memory, utilization) + others + memory.peak <= memory.total * utilization


@pytest.mark.parametrize("free", [0, 2 * GIB])
def test_nothing_left_is_an_error_with_the_numbers(free: int) -> None:
    memory = GpuMemory(total=10 * GIB, free=free, held=GIB, peak=2 * GIB)
    with pytest.raises(
        ValueError, match=rf"0\.9 of 10\.00 GiB is 9\.00 GiB.* 2\.00 GiB, others hold {9 - free // GIB}\.00 GiB"
    ):
        gpu_kv_cache_bytes(memory, 0.9)


def test_what_captured_steps_keep_is_what_the_first_step_takes(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(checkpoint(), device="cpu", dtype="float32", max_model_len=64, num_kvcache_blocks=20)
    assert isinstance(llm.executor, SingleRankExecutor)
    runner = llm.executor._runner
    assert runner is not None
    monkeypatch.setattr(runner, "can_capture", True)
    monkeypatch.setattr(type(runner.backend), "CAN_CAPTURE_CHUNKS", True)
    peaks = iter([700])  # asked for once: later the logits would be counted
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 100)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: next(peaks))
    assert runner.compute_largest_steps(num_layers=2) == 600


@pytest.mark.parametrize(
    ("max_num_batched_tokens", "max_num_seqs", "seqlens_q"),
    [(70, 8, [9] * 6 + [8] * 2), (5, 8, [1] * 5), (1000, 2, [64, 64])],
)
def test_largest_steps(
    checkpoint: Callable[..., Path],
    max_num_batched_tokens: int,
    max_num_seqs: int,
    seqlens_q: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[StepTensors] = []
    forward = ModelRunner._forward

    def record(self: ModelRunner, step: StepTensors) -> Tensor:
        steps.append(step._replace(metadata=step.metadata._replace(cu_seqlens_q=step.metadata.cu_seqlens_q.clone())))
        return forward(self, step)

    llm = LLM(
        checkpoint(),
        device="cpu",
        dtype="float32",
        max_model_len=64,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        num_kvcache_blocks=20,
    )
    assert isinstance(llm.executor, SingleRankExecutor)
    runner = llm.executor._runner
    assert runner is not None
    monkeypatch.setattr(ModelRunner, "_forward", record)
    assert runner.compute_largest_steps(num_layers=2) == 0, "nothing is captured on a CPU"
    prefill, decode = (step.metadata for step in steps)
    assert prefill.cu_seqlens_q.diff().tolist() == seqlens_q
    assert decode.cu_seqlens_q.diff().tolist() == [1] * len(seqlens_q)
    assert prefill.max_context_len == decode.max_context_len == 64
