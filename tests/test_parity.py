"""Parity with Transformers: the same logits and the same greedy tokens, on tiny random models and on a real one."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import CheckpointFactory
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import LLM, SamplingParams
from nanovllm.engine.executor import SingleRankExecutor

TOLERANCE = 1e-4  # between logits in float32
NUM_TOKENS = 64
PROMPT_LENGTHS = (1, 19, 48, 97)  # KV blocks of 16: less than one, whole ones, several and a rest
MAX_MODEL_LEN = max(PROMPT_LENGTHS) + NUM_TOKENS
ORIGINAL_POSITIONS = 32  # most of the tokens lie beyond, where the ways to stretch positions differ

ARCHITECTURES = ("Qwen3", "Qwen2", "Llama", "Mistral")  # each with ForCausalLM behind it
STRETCHED: dict[str, Any] = {"max_position_embeddings": 8 * ORIGINAL_POSITIONS, "head_dim": 64, "initializer_range": 0.15}
ROPE_KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {
        **STRETCHED,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL_POSITIONS,
        },
    },
    "yarn": {
        **STRETCHED,
        "rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL_POSITIONS},
    },
}
YARN = ROPE_KINDS["yarn"]["rope_scaling"]


class Case(NamedTuple):
    """A tiny model."""

    name: str
    architecture: str
    options: dict[str, Any]


CASES = [
    *(Case(f"{a}-{kind}", a, options) for a in ARCHITECTURES for kind, options in ROPE_KINDS.items()),
    *(Case(f"{a}-tied", a, {"tie_word_embeddings": True}) for a in ARCHITECTURES),
    *(
        Case(f"{a}-head-dim-{size}", a, {"head_dim": size})  # hidden_size / num_attention_heads is 16
        for a in ARCHITECTURES[::2]
        for size in (64, 80, 128)
    ),
    *(
        Case(
            f"{a}-gqa-{heads}-{kv_heads}",
            a,
            {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 8 * heads},
        )
        for a, heads, kv_heads in [
            ("Qwen3", 4, 4),
            ("Llama", 4, 4),
            ("Llama", 9, 3),
            ("Qwen2", 14, 2),
            ("Mistral", 4, 1),
        ]
    ),
    Case(
        "Llama-yarn-options",
        "Llama",
        {**STRETCHED, "rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3}},
    ),
    Case(
        "Llama-yarn-mscale",
        "Llama",
        {**STRETCHED, "rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}},
    ),
    Case("Qwen3-attention-bias", "Qwen3", {"attention_bias": True}),
    Case("Llama-attention-bias", "Llama", {"attention_bias": True}),
    Case("Llama-mlp-bias", "Llama", {"mlp_bias": True}),
    Case("Llama-both-biases", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Case("Qwen3-norm-eps", "Qwen3", {"rms_norm_eps": 0.1}),
    Case("Mistral-sliding-window", "Mistral", {"sliding_window": MAX_MODEL_LEN}),  # hides nothing within its size
]


class Completion(NamedTuple):
    """Greedy tokens after a prompt, and the logits that each was picked from."""

    prompt: list[int]
    token_ids: list[int]
    logits: Tensor  # float32 [num_tokens, vocab_size]


def load_transformers(folder: Path) -> Any:
    # Converting afterwards is exact, and asks for the dtype in no version's own way.
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()


@torch.inference_mode()
def complete_with_transformers(model: Any, prompt: list[int], num_tokens: int) -> Completion:
    """Transformers' own greedy generation, one prompt alone."""
    input_ids = torch.tensor([prompt])
    generated = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Completion(prompt, generated.sequences[0, len(prompt) :].tolist(), torch.cat(generated.logits).float())


def smallest_gap(completion: Completion) -> float:
    """The least distance of the two largest logits: by more than twice the tolerance, rounding decides no token."""
    first, second = completion.logits.topk(2).values.unbind(-1)
    return (first - second).min().item()


def make_references(folder: Path) -> list[Completion]:
    """Completions of random prompts; a prompt is drawn again when rounding could decide one of its tokens."""
    model = load_transformers(folder)
    generator = torch.Generator().manual_seed(0)
    references = []
    for length in PROMPT_LENGTHS:
        for _ in range(20):
            prompt = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
            reference = complete_with_transformers(model, prompt, NUM_TOKENS)
            if smallest_gap(reference) > 2 * TOLERANCE:
                break
        else:
            pytest.fail("these weights give logits too close to each other for comparing tokens")
        references.append(reference)
    return references


def complete_with_ours(folder: Path, prompts: list[list[int]], params: SamplingParams, **config: Any) -> list[Completion]:
    """Our greedy completions of a batch, with the logits as the sampler saw them; all prompts stay in every batch."""
    steps: list[Tensor] = []

    def record(sampler: nn.Module, args: tuple[Tensor, ...]) -> None:
        steps.append(args[0].float())

    with LLM(folder, device="cpu", max_num_seqs=len(prompts), **config) as llm:
        assert isinstance(llm.executor, SingleRankExecutor)
        assert llm.executor._runner is not None
        llm.executor._runner.sampler.register_forward_pre_hook(record)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    logits = torch.stack(steps, dim=1)  # fails unless each step sampled every sequence
    return [Completion(p, o["token_ids"], rows) for p, o, rows in zip(prompts, outputs, logits, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tiny_models_give_transformers_logits_and_tokens(case: Case, checkpoint: CheckpointFactory) -> None:
    folder = checkpoint(f"{case.architecture}ForCausalLM", **case.options)
    references = make_references(folder)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    prompts = [reference.prompt for reference in references]
    config = {"dtype": "float32", "max_model_len": MAX_MODEL_LEN}
    for backend in ("torch_reference", "cpu"):
        ours = complete_with_ours(folder, prompts, params, attention_backend=backend, **config)
        assert_equal(ours, references)


def assert_equal(ours: list[Completion], references: list[Completion]) -> None:
    """The same tokens, and logits within the tolerance."""
    for reference, completion in zip(references, ours, strict=True):
        assert completion.token_ids == reference.token_ids
        torch.testing.assert_close(completion.logits, reference.logits, rtol=0, atol=TOLERANCE)


QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List three uses of a brick.",
    "Translate 'good morning' into Spanish.",
    "What is 17 + 25?",
    "Write a Python function that reverses a string.",
    "Who wrote 'Romeo and Juliet', and what is it about? Answer for a child of ten, with a moral at the end.",
)


def test_real_model_gives_transformers_tokens(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = []
    for question in QUESTIONS:
        message = {"role": "user", "content": question}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has them
    model = load_transformers(smollm2)
    references = [complete_with_transformers(model, prompt, num_tokens=32) for prompt in prompts]
    assert min(map(smallest_gap, references)) > 2 * TOLERANCE, "rounding could decide a token: change the question"
    with LLM(smollm2, device="cpu", dtype="float32", max_model_len=256, max_num_seqs=len(prompts)) as llm:
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [reference.token_ids for reference in references]
    assert {output["finish_reason"] for output in outputs} == {"stop", "length"}  # ends of sequence are compared too


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_logits_are_close_to_those_of_float32(dtype: str, architecture: str, checkpoint: CheckpointFactory) -> None:
    # Rounding to the nearest is wrong by eps / sqrt(12) of the value, in the root mean square. A layer rounds seven
    # weights and about sixteen intermediate results, and there are two: sqrt(2 * 23) * eps / sqrt(12) is 2 eps in all,
    # where no attention is so sharp that it magnifies errors; hence weights that are not drawn so wide. Three times that
    # is for the worst of a few hundred rows.
    tolerance = 6 * torch.finfo(getattr(torch, dtype)).eps
    folder = checkpoint(f"{architecture}ForCausalLM", initializer_range=0.1)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(320, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    params = SamplingParams(temperature=0, max_tokens=8)
    exact = complete_with_ours(folder, prompts, params, dtype="float32")
    rounded = complete_with_ours(folder, prompts, params, dtype=dtype)
    for ours, reference in zip(rounded, exact, strict=True):
        # Up to the first token that differs, both continue the same text.
        same = [mine == theirs for mine, theirs in zip(ours.token_ids, reference.token_ids, strict=True)]
        num_rows = [*same, False].index(False) + 1
        errors = (ours.logits - reference.logits).norm(dim=-1) / reference.logits.norm(dim=-1)
        assert errors[:num_rows].max() < tolerance
        assert errors.max() > 0, "computed in float32 after all"
