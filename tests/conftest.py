"""What the tests share: tiny random checkpoints, made once a session, and the one real model."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch does where it is built for GPUs

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nanovllm.layers.cpu_layers import fuse_layers
from nanovllm.layers.sampler import Sampler
from nanovllm.utils.checkpoint import default_model
from nanovllm.utils.cpu_build import load_kernels

MODEL_TYPES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}

CheckpointFactory = Callable[..., Path]


def write_checkpoint(folder: Path, architecture: str = "Qwen3ForCausalLM", seed: int = 0, **options: object) -> Path:
    """A tiny random model in Hugging Face layout, without a tokenizer.

    The weights are drawn wide enough that the two best logits are nearly never within rounding of each other, so that
    equal tokens can be asked for.
    """
    shape: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if architecture == "MistralForCausalLM":
        shape["sliding_window"] = None
    config = AutoConfig.for_model(MODEL_TYPES[architecture], **{**shape, **options})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in model.named_parameters():  # norms and biases start at 1 and 0, which would hide mistakes
        if name.endswith(("norm.weight", ".bias")):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """Call with the arguments of `write_checkpoint`; equal arguments give the same folder."""
    made: dict[str, Path] = {}

    def factory(architecture: str = "Qwen3ForCausalLM", seed: int = 0, **options: object) -> Path:
        key = repr((architecture, seed, sorted(options.items())))
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture, seed, **options)
        return made[key]

    return factory


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, the real model that the examples use."""
    return default_model()


@pytest.fixture(scope="session")
def tiny_text_model(smollm2: Path, checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a real tokenizer: any bytes may come, and fast."""
    folder = tmp_path_factory.mktemp("model")
    for source in (smollm2, checkpoint(vocab_size=49152, eos_token_id=2, num_hidden_layers=1)):
        for file in source.iterdir():
            if source != smollm2 or "token" in file.name or file.suffix in (".jinja", ".txt"):
                shutil.copy(file, folder)
    return folder


@pytest.fixture(params=["plain", "C++"])
def each_sampler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's `sample` is the plain sampler, then the one of C++."""
    if request.param == "C++":
        sampler = Sampler()
        fuse_layers(sampler, load_kernels())
        monkeypatch.setattr(request.module, "sample", sampler)


@pytest.fixture
def threads() -> Iterator[None]:
    """Let a test change the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 3])
def one_thread_and_three(request: pytest.FixtureRequest, threads: None) -> None:
    """Run a test with so many threads."""
    torch.set_num_threads(request.param)
