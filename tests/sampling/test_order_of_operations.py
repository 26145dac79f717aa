"""What is sampled, against Transformers' logits processors: every option alone and in random combinations.

The sampler gives tokens, no probabilities. But numbers a little below and above each boundary between two tokens of the
expected distribution tell whether the sampler has the boundary there too.
"""

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from nanovllm import SamplingParams
from nanovllm.engine.sampling_state import SamplingState
from nanovllm.engine.scheduled_batch import StartedSequence
from nanovllm.layers.logits_processors import edit_logits
from nanovllm.layers.sampler import Filters, Sampler

sample = Sampler()
pytestmark = pytest.mark.usefixtures("each_sampler")

STOP = (3, 7)  # what ends a sequence, beside its own stop_token_ids
INF = float("inf")


class Case:
    """A row of logits, tokens before it, and options."""

    def __init__(self, seed: int, vocab_size: int, **options: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        rng = Random(seed)
        self.logits = torch.randn(vocab_size, generator=generator) * rng.choice([1.0, 3.0])
        self.params = SamplingParams(max_tokens=100, **options)
        self.prompt = rng.choices(range(vocab_size // 2), k=rng.randint(1, 12))
        self.output = rng.choices(range(vocab_size), k=rng.randint(1, 12)) + rng.choices(self.prompt, k=2)

    def start(self, row: int) -> StartedSequence:
        stop = tuple({*STOP, *self.params.stop_token_ids})
        tokens = (*self.prompt, *self.output)
        return StartedSequence(row, row, tokens, len(self.prompt), 0, (), self.params, 0, stop)

    def expected(self) -> Tensor:
        """Probabilities, float64 [vocab_size], as Transformers' processors give them."""
        params, scores = self.params, self.logits[None].clone()
        input_ids = torch.tensor([[*self.prompt, *self.output]])
        processors: list[Any] = []
        if params.allowed_token_ids is not None:
            others = sorted({*range(scores.shape[1])} - {*params.allowed_token_ids})
            processors.append(hf.SuppressTokensLogitsProcessor(others))
        if params.min_tokens:
            stop = list({*STOP, *params.stop_token_ids})
            processors.append(hf.MinNewTokensLengthLogitsProcessor(len(self.prompt), params.min_tokens, stop))
        if params.logit_bias:
            processors.append(hf.SequenceBiasLogitsProcessor({(token,): bias for token, bias in params.logit_bias}))
        if params.repetition_penalty != 1:
            processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        scores = hf.LogitsProcessorList(processors)(input_ids, scores)
        counts = torch.tensor(self.output).bincount(minlength=scores.shape[1])  # Transformers has no penalty of this kind
        scores = scores - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        warpers: list[Any] = [hf.TemperatureLogitsWarper(float(params.temperature))]
        if params.top_k > 0:
            warpers.append(hf.TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            warpers.append(hf.TopPLogitsWarper(params.top_p))
        if params.min_p > 0:
            warpers.append(hf.MinPLogitsWarper(params.min_p))
        scores = hf.LogitsProcessorList(warpers)(input_ids, scores)
        return scores[0].double().softmax(dim=0)


def pick(cases: list[Case], uniforms: Tensor) -> Tensor:
    """The tokens that `uniforms` [cases, numbers] pick in each case, all in one batch: the same shape."""
    state = SamplingState(len(cases))
    rows = np.arange(len(cases))
    token_ids = np.zeros((len(cases), 64), np.int32)
    started = [case.start(row) for row, case in enumerate(cases)]
    for one in started:
        state.start(one)
        token_ids[one.row, : len(one.token_ids)] = one.token_ids
    options = state.options(rows, np.array([len(one.token_ids) for one in started]), token_ids)
    logits, filters = torch.stack([case.logits for case in cases]), None
    if options is not None:
        logits = logits if options.edits is None else edit_logits(logits, options.edits)
        filters = options.filters

    def repeat(values: Tensor) -> Tensor:
        return values.repeat_interleave(uniforms.shape[1], dim=0)

    picked = sample(
        repeat(logits),
        repeat(torch.from_numpy(state.temperatures)),
        uniforms.flatten(),
        None if filters is None else Filters(*map(repeat, filters)),
    )
    return picked.view(uniforms.shape)


ALONE: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.1},
    {"frequency_penalty": -0.7},
    {"logit_bias": {0: 2.0, 5: -3.5, 39: 50.0}},
    {"allowed_token_ids": [1, 3, 8, 30]},
    {"min_tokens": 50},
    {"min_tokens": 1, "stop_token_ids": [4]},
    {"min_tokens": 60, "stop_token_ids": [4, 3, 20]},
    {"top_k": 7, "top_p": 0.8, "min_p": 0.2, "temperature": 1.5},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.4, "logit_bias": {2: 1.0}, "top_p": 0.95},
]


def check_boundaries(cases: list[Case], num_boundaries: int) -> None:
    """Each boundary of the cumulative sum is where it is expected, within 5e-6: so each probability within 1e-5."""
    near, tolerance = 2.5e-6, 2.4e-6
    number = 2 * num_boundaries
    orders, uppers, uniforms = [], [], []
    for case in cases:
        probabilities = case.expected()
        vocab_size = len(probabilities)
        # Filtered rows go from the most likely token down, others from token 0 up.
        filtered = 0 < case.params.top_k < vocab_size or case.params.top_p < 1
        order = probabilities.argsort(descending=True, stable=True) if filtered else torch.arange(vocab_size)
        upper = probabilities[order].cumsum(0)
        possible = probabilities[order].nonzero()[:, 0]
        chosen = upper[possible[torch.linspace(0, len(possible) - 1, num_boundaries).long()]]
        orders.append(order)
        uppers.append(upper)
        uniforms.append(torch.cat([chosen - near, chosen + near]).clamp(0, 1 - 2.0**-24).float())
    picked = pick(cases, torch.stack(uniforms))
    for case, order, upper, numbers, tokens in zip(cases, orders, uppers, uniforms, picked, strict=True):
        place = order.argsort()[tokens]
        assert len(numbers) == number
        assert (place >= torch.searchsorted(upper, numbers - tolerance, right=True)).all(), case.params
        assert (place <= torch.searchsorted(upper, numbers + tolerance, right=True)).all(), case.params
        assert (upper.diff(prepend=torch.zeros(1, dtype=torch.float64))[place] > 0).all(), case.params


@pytest.mark.parametrize("options", ALONE, ids=str)
def test_probabilities_are_transformers(options: dict[str, Any]) -> None:
    check_boundaries([Case(seed, vocab_size=40, **options) for seed in range(3)], num_boundaries=40)


def random_options(rng: Random, vocab_size: int) -> dict[str, Any]:
    choices: dict[str, Any] = {
        "temperature": rng.uniform(0.2, 2.0),
        "top_k": rng.choice([1, 3, 20, 60, 130, 900]),
        "top_p": rng.uniform(0.05, 0.999),
        "min_p": rng.uniform(0.001, 0.3),
        "repetition_penalty": rng.uniform(0.6, 1.8),
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "logit_bias": {token: rng.uniform(-4, 4) for token in rng.sample(range(vocab_size), 5)},
        "allowed_token_ids": rng.sample(range(vocab_size), vocab_size // 3),
        "min_tokens": rng.choice([1, 50]),
        "stop_token_ids": rng.sample(range(vocab_size), 2),
    }
    return {name: value for name, value in choices.items() if rng.random() < 0.5}


@pytest.mark.parametrize("vocab_size", [200, 1024, 20_000])
def test_random_combinations_in_one_batch(vocab_size: int) -> None:
    rng = Random(vocab_size)
    cases = [Case(seed, vocab_size, **random_options(rng, vocab_size)) for seed in range(40)]
    check_boundaries(cases, num_boundaries=12)


def test_greedy_takes_the_largest_after_the_penalties() -> None:
    case = Case(seed=1, vocab_size=40, temperature=0, repetition_penalty=3.0, logit_bias={9: 0.5}, top_k=5, min_p=0.1)
    case.params, params = SamplingParams(temperature=1.0, repetition_penalty=3.0, logit_bias={9: 0.5}), case.params
    expected = int(case.expected().argmax())
    case.params = params
    assert pick([case], torch.tensor([[0.9]])).item() == expected != int(case.logits.argmax())


@pytest.mark.parametrize("options", [{"allowed_token_ids": [0, 1]}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_unsound_logits_are_found_whatever_is_forbidden(options: dict[str, Any], bad: float) -> None:
    cases = [Case(seed, 40, **options) for seed in range(3)]
    cases[1].logits[30] = bad  # token 30 is not among the allowed ones
    picked = pick(cases, torch.full((3, 1), 0.5))[:, 0].tolist()
    assert picked[1] == -1
    assert min(picked[0], picked[2]) >= 0
