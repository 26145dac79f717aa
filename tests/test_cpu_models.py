"""Whole models on the CPU kernel with packed weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_builds import EMULATED, emulate
from kept_logits import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import LLM, SamplingParams
from nanovllm.utils.cpu_build import load_library, machine_flags

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n",
    "Water boils at a temperature of",
    "The three primary colours are",
    "In 1969, for the first time, people",
    "A recipe for pancakes: take",
    "Dear Sir or Madam,",
]


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen2ForCausalLM"])
def test_same_tokens_as_on_the_plain_backend(architecture: str, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint(architecture)
    prompts = [[(7 * i + 3 * j) % 320 for j in range(length)] for i, length in enumerate((1, 15, 16, 40, 130))]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    options = {"dtype": "float32", "max_num_batched_tokens": 50, "num_kvcache_blocks": 24, "device": "cpu"}
    outputs = [
        LLM(folder, attention_backend=backend, **options).generate(prompts, params, use_tqdm=False)
        for backend in ("cpu", "torch_reference")
    ]
    assert [one["token_ids"] for one in outputs[0]] == [one["token_ids"] for one in outputs[1]]


def test_bfloat16_greedy_tokens_are_those_of_transformers(smollm2: Path) -> None:
    assert json.loads((smollm2 / "config.json").read_text())["model_type"] == "llama"
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    llm = LLM(smollm2, dtype="bfloat16", device="cpu", attention_backend="cpu", max_model_len=128, num_kvcache_blocks=64)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = prompt + output["token_ids"]
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].float()
        for row, token in zip(logits, output["token_ids"], strict=True):
            # Where the two models differ, they must not be able to tell the two tokens apart: logits are rounded to
            # bf16, and so is everything in 30 layers before them. After a first difference the texts are not compared.
            if (best := int(row.argmax())) != token:
                assert row[best] - row[token] <= 4 * torch.finfo(torch.bfloat16).eps * row[best].abs()
                break


def test_bfloat16_by_its_instructions_is_as_near_to_float32_as_by_widened_weights(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole model on AVX-512's and AMX's instructions, emulated: products, attention, weights in pairs, a tied table."""
    prompts = [[(7 * i + 3 * j) % 320 for j in range(length)] for i, length in enumerate((1, 15, 16, 40, 130))]
    folder = checkpoint(tie_word_embeddings=True)

    def first_logits(dtype: str, flags: list[str]) -> torch.Tensor:
        with monkeypatch.context() as patch:
            for user in ("nanovllm.attention.cpu", "nanovllm.engine.model_loading"):
                patch.setattr(f"{user}.load_kernels", lambda: load_library(flags))
                patch.setattr("nanovllm.engine.model_loading.is_fastest", lambda *_: True)
            kept = run(LLM(folder, dtype=dtype, device="cpu", attention_backend="cpu", num_kvcache_blocks=24), prompts)
        positions = {prompt: min(place for index, place in kept if index == prompt) for prompt in range(len(prompts))}
        return torch.stack([kept[place] for place in positions.items()]).float()

    exact = first_logits("float32", machine_flags())
    widened = (first_logits("bfloat16", emulate()) - exact).abs().max()
    # All round to bfloat16 at the same places, their sums before it differ by float32's rounding: errors of one size.
    for flags in EMULATED.values():
        error = (first_logits("bfloat16", flags) - exact).abs().max()
        assert 0 < error <= 2 * widened < 0.1 * exact.abs().max()
