"""The logits of every sampled token, kept to be compared bit by bit."""

from typing import Any

import torch
from torch import Tensor

from nanovllm import LLM, SamplingParams
from nanovllm.engine.step_inputs import StepInputs

NUM_TOKENS = 6  # of every output
PARAMS = SamplingParams(seed=1, max_tokens=NUM_TOKENS, top_p=0.95, ignore_eos=True)
Logits = dict[tuple[int, int], Tensor]  # by (prompt, position)


def run(llm: LLM, prompts: list[list[int]]) -> Logits:
    """The logits that each output token was sampled from."""
    runner: Any = llm.executor._runner  # type: ignore[attr-defined]
    kept: Logits = {}
    sample = runner._sample

    def keep(inputs: StepInputs, logits: Tensor) -> Any:
        for row, position, row_logits in zip(*runner.input_batch.sampled, logits, strict=True):
            kept[int(runner.input_batch.seq_ids[row]), int(position)] = row_logits.clone()
        return sample(inputs, logits)

    runner._sample = keep
    llm.generate(prompts, PARAMS, use_tqdm=False)
    runner._sample = sample
    first = min(seq_id for seq_id, _ in kept)
    return {(seq_id - first, position): row for (seq_id, position), row in kept.items()}


def run_alone(llm: LLM, prompts: list[list[int]]) -> Logits:
    """The same, one prompt after the other."""
    kept: Logits = {}
    for index, prompt in enumerate(prompts):
        kept |= {(index, position): row for (_, position), row in run(llm, [prompt]).items()}
    return kept


def check(logits: Logits, expected: Logits, num_prompts: int) -> None:
    """All bits of the first prompts' logits are equal."""
    assert len(logits) == NUM_TOKENS * num_prompts
    assert [key for key, row in logits.items() if not torch.equal(row, expected[key])] == []
