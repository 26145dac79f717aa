"""Which attention backend is taken, what is said about it, and what is refused."""

import logging
import subprocess
import sys

import pytest
import torch

from nanovllm.attention import backend as backend_module
from nanovllm.attention.backend import AttentionBackend, AttentionSpec, choose_backend
from nanovllm.attention.torch_reference import TorchReferenceBackend


class Fast(TorchReferenceBackend):
    DEFAULT_BLOCK_SIZE = 256

    @staticmethod
    def why_not(spec: AttentionSpec) -> str | None:
        return None if spec.block_size == 256 else "it wants blocks of 256"


@pytest.fixture(autouse=True)
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = backend_module._Entry
    monkeypatch.setattr(
        backend_module,
        "BACKENDS",
        {
            "gpu_only": entry("nanovllm.attention.torch_reference", "TorchReferenceBackend", ("cuda",)),
            "fast": entry(__name__, "Fast", ("cpu",)),
            "plain": entry("nanovllm.attention.torch_reference", "TorchReferenceBackend", ("cpu",)),
        },
    )


def spec_with(block_size: int | None) -> object:
    def make_spec(backend: type[AttentionBackend]) -> AttentionSpec:
        return AttentionSpec(4, 2, 16, block_size or backend.DEFAULT_BLOCK_SIZE, torch.float32, torch.device("cpu"))

    return make_spec


def test_auto_takes_the_first_that_can_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert type(choose_backend("auto", spec_with(None))).__name__ == "Fast"
    assert "attention backend: fast (the first choice on cpu)" in caplog.text
    assert type(choose_backend("auto", spec_with(16))).__name__ == "TorchReferenceBackend"
    assert "attention backend: plain (fast: it wants blocks of 256)" in caplog.text


def test_explicit_choice_that_cannot_work() -> None:
    with pytest.raises(ValueError, match="attention_backend='fast' cannot be used here: it wants blocks of 256"):
        choose_backend("fast", spec_with(16))
    with pytest.raises(ValueError, match="must be 'auto' or one of gpu_only, fast, plain, got 'flash'"):
        choose_backend("flash", spec_with(16))


def test_nothing_for_gpus_is_imported_before_it_is_needed() -> None:
    # Whether torch and transformers import Triton for themselves depends on their builds.
    ours = ["nanovllm.attention.triton_kernels", "nanovllm.layers.triton_layers", "flash_attn"]
    code = f"import sys, nanovllm; assert not set({ours}) & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
