"""The flash-attn backend on a stand-in for the package, and what it says where it cannot serve."""

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import flash_attn_double
import pytest
import torch
from backend_parity import check_against_plain, random_seqlens

from nanovllm import LLM, SamplingParams
from nanovllm.attention.backend import AttentionSpec
from nanovllm.attention.flash_attn import FlashAttnBackend

CPU_SPEC = AttentionSpec(4, 2, 16, 256, torch.float32, torch.device("cpu"))
GPU_SPEC = AttentionSpec(16, 8, 128, 256, torch.bfloat16, torch.device("cuda"))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_double)


@pytest.mark.usefixtures("package")
def test_batches_with_prefill_and_without() -> None:
    backend = FlashAttnBackend(CPU_SPEC)
    check_against_plain(backend, [(30, 30), (20, 1), (25, 7)], seed=0)
    check_against_plain(backend, [(30, 1), (257, 1), (1, 1)], seed=1)
    rng = random.Random(2)
    check_against_plain(backend, random_seqlens(rng, longest=40, num_seqs=4), seed=2)


@pytest.mark.usefixtures("package")
def test_whole_model_gives_the_plain_backends_tokens(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlashAttnBackend, "why_not", staticmethod(lambda spec: None))
    prompts = [random.Random(seed).choices(range(320), k=length) for seed, length in enumerate((40, 7, 20))]
    results = []
    for backend in ("torch_reference", "flash_attn"):
        options = {"max_num_batched_tokens": 30, "max_model_len": 300, "num_kvcache_blocks": 6, "dtype": "float32"}
        llm = LLM(checkpoint("Qwen3ForCausalLM"), device="cpu", attention_backend=backend, **options)
        assert llm.executor.block_size == {"torch_reference": 16, "flash_attn": 256}[backend]
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
        results.append([output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)])
    assert results[0] == results[1]


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("spec", "capability", "reason"),
    [
        (GPU_SPEC, (8, 0), None),
        (GPU_SPEC, (9, 0), None),
        (GPU_SPEC, (7, 5), "this GPU has 7.5"),
        (replace(GPU_SPEC, dtype=torch.float32), (8, 0), "the model's dtype is torch.float32"),
        (replace(GPU_SPEC, block_size=16), (8, 0), "a multiple of 256, got 16"),
        (replace(GPU_SPEC, head_dim=84), (8, 0), "multiples of 8 up to 256, got 84"),
        (replace(GPU_SPEC, batch_invariant=True), (8, 0), "batch_invariant needs fixed splits"),
        (CPU_SPEC, (0, 0), "NVIDIA GPU"),
    ],
)
def test_why_not(
    spec: AttentionSpec, capability: tuple[int, int], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.delenv("TRITON_INTERPRET")
    found = FlashAttnBackend.why_not(spec)
    assert found == reason if reason is None else reason in str(found)


def test_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # makes the import fail
    assert "pip install flash-attn" in str(FlashAttnBackend.why_not(GPU_SPEC))
