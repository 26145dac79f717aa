"""The same requests give the same tokens in whatever way the engine happens to compute them.

What is expected comes from the plainest way there is: each request alone, in an engine of its own, its prompt computed
whole, nothing cached. Every other way (batches, chunks, cache hits, preemption, block sizes, orders) is held against it.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager, HashFunction
from nanovllm.outputs import RequestOutput

CheckpointFactory = Callable[..., Path]

BACKENDS = ["torch_reference", "cpu"]
ARCHITECTURES = ["Qwen3ForCausalLM", "LlamaForCausalLM"]
BLOCK_SIZES = [16, 32, 48, 256]
VOCAB_SIZE = 320
MAX_MODEL_LEN = 640
NUM_BLOCKS = 80  # of 16 tokens: more than any test here can fill


class Request(NamedTuple):
    """A prompt and how to continue it."""

    prompt: tuple[int, ...]
    params: SamplingParams


class Reference:
    """What each request gives alone, computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Request, list[int]] = {}

    def __call__(self, requests: list[Request]) -> list[list[int]]:
        return [self._alone(request) for request in requests]

    def _alone(self, request: Request) -> list[int]:
        if request not in self._known:
            options = {"enable_prefix_caching": False, "attention_backend": "torch_reference"}
            llm = make_llm(self.folder, max_num_batched_tokens=MAX_MODEL_LEN, max_num_seqs=1, **options)
            self._known[request] = tokens_of(generate(llm, [request]))[0]
            assert llm.scheduler.num_preemptions == 0
        return self._known[request]


def make_llm(folder: Path, **options: object) -> LLM:
    defaults: dict[str, object] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": MAX_MODEL_LEN,
        "num_kvcache_blocks": NUM_BLOCKS,
        "kvcache_block_size": 16,
    }
    return LLM(folder, **{**defaults, **options})


def generate(llm: LLM, requests: list[Request]) -> list[RequestOutput]:
    prompts = [list(request.prompt) for request in requests]
    return llm.generate(prompts, [request.params for request in requests], use_tqdm=False)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(VOCAB_SIZE), k=length))


def mixed_params(index: int, max_tokens: int) -> SamplingParams:
    """Greedy, and sampling at two temperatures, in turn."""
    if index % 3 == 0:
        return SamplingParams(temperature=0.0, max_tokens=max_tokens)
    return SamplingParams(temperature=(0.7, 1.3)[index % 3 - 1], seed=1000 + index, max_tokens=max_tokens)


def make_requests(block_size: int, max_tokens: int = 20) -> list[Request]:
    """Prompts that end before, at and after block boundaries, some that share prefixes, and equal ones."""
    b = block_size
    prompts = [random_prompt(length, seed=length) for length in (1, b - 1, b, b + 1, 2 * b - 1, 2 * b, 2 * b + 1)]
    longest = prompts[-1]
    prompts += [
        longest[:b] + random_prompt(5, seed=1),  # shares one block
        longest[: b + 3] + random_prompt(b, seed=2),  # shares one block and a part of the next
        longest[: 2 * b],  # shares all of its blocks
        longest,  # twice the same prompt, continued in another way
        prompts[2],  # and a block long
    ]
    return [Request(prompt, mixed_params(index, max_tokens + index % 4)) for index, prompt in enumerate(prompts)]


def full_blocks(num_tokens: int, block_size: int) -> int:
    """Tokens that a prompt of `num_tokens` finds when all of it was computed before: one at least is always left."""
    return (num_tokens - 1) // block_size * block_size


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reference(request: pytest.FixtureRequest, checkpoint: CheckpointFactory) -> Reference:
    return Reference(checkpoint(request.param))


@pytest.fixture(scope="module")
def qwen3(checkpoint: CheckpointFactory) -> Reference:
    return Reference(checkpoint("Qwen3ForCausalLM"))


def test_expectations_can_tell_mistakes_apart(reference: Reference) -> None:
    # A model that repeats itself, or gives the same whatever the prompt, would prove nothing below.
    requests = make_requests(16)
    completions = reference(requests)
    assert all(len(set(tokens)) > 8 for tokens in completions)
    assert len({tuple(tokens[:8]) for tokens in completions}) == len(requests)


# ---- batches, blocks, chunks ----


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_batch_equals_alone(reference: Reference, backend: str, block_size: int, enable_prefix_caching: bool) -> None:
    requests = make_requests(block_size)
    llm = make_llm(
        reference.folder,
        attention_backend=backend,
        kvcache_block_size=block_size,
        enable_prefix_caching=enable_prefix_caching,
    )
    assert tokens_of(generate(llm, requests)) == reference(requests)
    assert llm.scheduler.num_preemptions == 0


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("offset", [-1, 0, 1])
@pytest.mark.parametrize("num_blocks", [1, 2, 3])
def test_chunks_that_end_around_block_boundaries(
    qwen3: Reference, backend: str, block_size: int, num_blocks: int, offset: int
) -> None:
    requests = make_requests(block_size)
    llm = make_llm(
        qwen3.folder,
        attention_backend=backend,
        kvcache_block_size=block_size,
        max_num_batched_tokens=num_blocks * block_size + offset,
        enable_prefix_caching=num_blocks != 2,
    )
    assert tokens_of(generate(llm, requests)) == qwen3(requests)


@pytest.mark.parametrize("budget", [1, 2, 7])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_tiny_chunks(reference: Reference, backend: str, budget: int, enable_prefix_caching: bool) -> None:
    # A budget below the number of sequences: those at the end of the queue wait, and none may stall.
    requests = make_requests(16, max_tokens=4)
    llm = make_llm(
        reference.folder,
        attention_backend=backend,
        max_num_batched_tokens=budget,
        enable_prefix_caching=enable_prefix_caching,
    )
    assert tokens_of(generate(llm, requests)) == reference(requests)


@pytest.mark.parametrize("budget", [255, 256, 257])
def test_chunks_of_large_blocks(qwen3: Reference, backend: str, budget: int) -> None:
    requests = make_requests(256, max_tokens=6)
    llm = make_llm(
        qwen3.folder,
        attention_backend=backend,
        kvcache_block_size=256,
        num_kvcache_blocks=48,
        max_num_batched_tokens=budget,
    )
    assert tokens_of(generate(llm, requests)) == qwen3(requests)
    assert tokens_of(generate(llm, requests)) == qwen3(requests)


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 12, 100])
def test_number_of_sequences_at_a_time(qwen3: Reference, backend: str, max_num_seqs: int) -> None:
    requests = make_requests(16)
    llm = make_llm(qwen3.folder, attention_backend=backend, max_num_seqs=max_num_seqs)
    assert tokens_of(generate(llm, requests)) == qwen3(requests)


@pytest.mark.parametrize("shuffle", range(4))
def test_order_of_requests(qwen3: Reference, backend: str, shuffle: int) -> None:
    requests = make_requests(16)
    if shuffle == 0:
        requests.reverse()
    else:
        random.Random(shuffle).shuffle(requests)
    llm = make_llm(qwen3.folder, attention_backend=backend, max_num_seqs=5)
    assert tokens_of(generate(llm, requests)) == qwen3(requests)


@pytest.mark.parametrize("steps_between", [1, 3])
def test_requests_that_arrive_while_others_run(qwen3: Reference, backend: str, steps_between: int) -> None:
    requests = make_requests(16)
    llm = make_llm(qwen3.folder, attention_backend=backend, max_num_batched_tokens=40)
    waiting = list(requests)
    order: list[int] = []
    finished: dict[int, list[int]] = {}
    while waiting or not llm.is_finished():
        if waiting:
            request = waiting.pop(0)
            order.append(llm.add_request(list(request.prompt), request.params))
        for _ in range(steps_between):
            finished.update(llm.step()[0])
    assert [finished[seq_id] for seq_id in order] == qwen3(requests)


# ---- the prefix cache ----


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("budget", [33, 2048])
def test_warm_cache_equals_cold(qwen3: Reference, backend: str, block_size: int, budget: int) -> None:
    requests = make_requests(block_size, max_tokens=8)
    llm = make_llm(
        qwen3.folder,
        attention_backend=backend,
        kvcache_block_size=block_size,
        max_num_batched_tokens=budget,
    )
    for is_warm in (False, True):
        outputs = generate(llm, requests)
        assert tokens_of(outputs) == qwen3(requests)
        if is_warm:
            expected = [full_blocks(len(request.prompt), block_size) for request in requests]
            assert [output["num_cached_tokens"] for output in outputs] == expected


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("num_blocks", [1, 2])
def test_whole_prompt_cached(reference: Reference, backend: str, block_size: int, num_blocks: int) -> None:
    request = Request(random_prompt(num_blocks * block_size, seed=5), SamplingParams(temperature=0.8, seed=5, max_tokens=9))
    llm = make_llm(reference.folder, attention_backend=backend, kvcache_block_size=block_size)
    for num_cached_tokens in (0, (num_blocks - 1) * block_size, (num_blocks - 1) * block_size):
        outputs = generate(llm, [request])
        assert tokens_of(outputs) == reference([request])
        assert outputs[0]["num_cached_tokens"] == num_cached_tokens
        assert outputs[0]["num_prompt_tokens"] == len(request.prompt)


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("budget", [16, 48, 50, 2048])
@pytest.mark.parametrize("length", [1, 47, 48, 49, 96])
def test_equal_prompts_in_one_call(qwen3: Reference, backend: str, block_size: int, budget: int, length: int) -> None:
    # The later ones must not read blocks that the first has not written yet, and need not compute them again.
    prompt = random_prompt(length, seed=6)
    requests = [Request(prompt, mixed_params(index, max_tokens=5)) for index in range(5)]
    llm = make_llm(qwen3.folder, attention_backend=backend, kvcache_block_size=block_size, max_num_batched_tokens=budget)
    outputs = generate(llm, requests)
    assert tokens_of(outputs) == qwen3(requests)
    assert [output["num_cached_tokens"] for output in outputs] == [0] + [full_blocks(length, block_size)] * 4


@pytest.mark.parametrize("num_shared", [15, 16, 17, 32, 40])
@pytest.mark.parametrize("budget", [20, 2048])
def test_shared_prefixes_in_one_call(qwen3: Reference, backend: str, num_shared: int, budget: int) -> None:
    shared = random_prompt(num_shared, seed=7)
    requests = [Request(shared + random_prompt(9, seed=70 + i), mixed_params(i, max_tokens=5)) for i in range(4)]
    llm = make_llm(qwen3.folder, attention_backend=backend, max_num_batched_tokens=budget)
    outputs = generate(llm, requests)
    assert tokens_of(outputs) == qwen3(requests)
    assert [output["num_cached_tokens"] for output in outputs] == [0] + [num_shared // 16 * 16] * 3


def test_prompts_that_differ_in_their_first_token_share_nothing(qwen3: Reference, backend: str) -> None:
    # The second blocks hold equal tokens, but they stand for other contexts.
    rest = random_prompt(40, seed=8)
    requests = [Request((token, *rest), mixed_params(token, max_tokens=6)) for token in range(3)]
    llm = make_llm(qwen3.folder, attention_backend=backend)
    for request in requests:
        outputs = generate(llm, [request])
        assert tokens_of(outputs) == qwen3([request])
        assert outputs[0]["num_cached_tokens"] == 0


@pytest.mark.parametrize("prompt_length", [10, 16, 17, 31])
def test_a_conversation_finds_its_answers(qwen3: Reference, backend: str, prompt_length: int) -> None:
    # The next turn's prompt holds the last one's output, whose very last token was sampled but never computed.
    llm = make_llm(qwen3.folder, attention_backend=backend)
    prompt = random_prompt(prompt_length, seed=9)
    num_computed = 0
    for turn in range(4):
        request = Request(prompt, mixed_params(turn, max_tokens=13))
        outputs = generate(llm, [request])
        assert tokens_of(outputs) == qwen3([request])
        assert outputs[0]["num_cached_tokens"] == num_computed // 16 * 16
        num_computed = len(prompt) + 13 - 1
        prompt += (*outputs[0]["token_ids"], *random_prompt(3, seed=90 + turn))


def test_nothing_is_cached_without_the_cache(qwen3: Reference, backend: str) -> None:
    requests = make_requests(16, max_tokens=5)
    llm = make_llm(qwen3.folder, attention_backend=backend, enable_prefix_caching=False)
    for _ in range(2):
        outputs = generate(llm, requests)
        assert tokens_of(outputs) == qwen3(requests)
        assert {output["num_cached_tokens"] for output in outputs} == {0}


def test_blocks_that_were_reused_are_not_found(qwen3: Reference, backend: str) -> None:
    # Four blocks: the second prompt takes those of the first, block by block from its end.
    llm = make_llm(qwen3.folder, attention_backend=backend, num_kvcache_blocks=4)
    first = Request(random_prompt(50, seed=10), SamplingParams(temperature=0.0, max_tokens=5))
    second = Request(random_prompt(30, seed=11), SamplingParams(temperature=0.0, max_tokens=3))
    for request, num_cached_tokens in ((first, 0), (first, 48), (second, 0), (first, 32), (second, 0)):
        outputs = generate(llm, [request])
        assert tokens_of(outputs) == qwen3([request])
        assert outputs[0]["num_cached_tokens"] == num_cached_tokens


@pytest.mark.parametrize(
    "hash_block",
    [
        lambda parent, tokens: 0,
        lambda parent, tokens: sum(tokens) % 3,
        lambda parent, tokens: hash(tuple(tokens)),
    ],
    ids=["constant", "few", "without_parent"],
)
@pytest.mark.parametrize("num_blocks", [8, NUM_BLOCKS])
def test_hashes_that_collide(qwen3: Reference, backend: str, hash_block: HashFunction, num_blocks: int) -> None:
    llm = make_llm(qwen3.folder, attention_backend=backend, num_kvcache_blocks=num_blocks)
    llm.scheduler.block_manager = BlockManager(num_blocks, 16, hash_function=hash_block)
    rest = random_prompt(33, seed=40)  # the same tokens in other contexts
    requests = make_requests(16, max_tokens=4)
    requests += [Request(random_prompt(16, seed=41 + i) + rest, mixed_params(i, max_tokens=12)) for i in range(3)]
    for _ in range(2):
        assert tokens_of(generate(llm, requests)) == qwen3(requests)
        requests.reverse()


# ---- preemption ----


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("budget", [3, 2048])
def test_preemption_equals_none(
    qwen3: Reference, backend: str, block_size: int, enable_prefix_caching: bool, budget: int
) -> None:
    requests = [
        Request(random_prompt(block_size - 6 + index, seed=20 + index), mixed_params(index, max_tokens=block_size + 8))
        for index in range(4)
    ]
    llm = make_llm(
        qwen3.folder,
        attention_backend=backend,
        kvcache_block_size=block_size,
        num_kvcache_blocks=4,  # one request alone needs two or three
        max_num_batched_tokens=budget,
        enable_prefix_caching=enable_prefix_caching,
    )
    outputs = generate(llm, requests)
    assert tokens_of(outputs) == qwen3(requests)
    assert llm.scheduler.num_preemptions > 0
    assert {output["num_cached_tokens"] for output in outputs} == {0}  # of the prompt, when it first ran
    manager = llm.scheduler.block_manager
    assert manager.num_free_blocks == manager.num_blocks


@pytest.mark.parametrize(("num_blocks", "max_num_seqs"), [(5, 2), (5, 12), (9, 12)])
def test_preemption_with_shared_prefixes(qwen3: Reference, backend: str, num_blocks: int, max_num_seqs: int) -> None:
    requests = make_requests(16, max_tokens=24)
    llm = make_llm(qwen3.folder, attention_backend=backend, num_kvcache_blocks=num_blocks, max_num_seqs=max_num_seqs)
    assert tokens_of(generate(llm, requests)) == qwen3(requests)
    assert llm.scheduler.num_preemptions > 0
    assert tokens_of(generate(llm, requests)) == qwen3(requests)


def test_preempted_request_finds_its_own_blocks(qwen3: Reference, backend: str) -> None:
    # Three blocks each, then the first needs a fourth and takes the last of the second's. What the second finds when it
    # starts again is its own work, not what the cache spared it.
    requests = [Request(random_prompt(40, seed=50 + index), mixed_params(index, max_tokens=20)) for index in range(2)]
    llm = make_llm(qwen3.folder, attention_backend=backend, num_kvcache_blocks=6)
    outputs = generate(llm, requests)
    assert tokens_of(outputs) == qwen3(requests)
    assert llm.scheduler.num_preemptions == 1
    assert [output["num_cached_tokens"] for output in outputs] == [0, 0]


# ---- everything at once ----


@pytest.mark.parametrize("seed", range(16))
def test_random_settings(qwen3: Reference, backend: str, seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([16, 32, 48])
    requests = rng.sample(make_requests(block_size, max_tokens=12), k=rng.randint(3, 12))
    largest = max(len(request.prompt) + request.params.max_tokens for request in requests)
    llm = make_llm(
        qwen3.folder,
        attention_backend=backend,
        kvcache_block_size=block_size,
        num_kvcache_blocks=-(-largest // block_size) + rng.randint(0, 6),
        max_num_batched_tokens=rng.choice([rng.randint(1, 5), rng.randint(6, 100), 2048]),
        max_num_seqs=rng.randint(1, 12),
        enable_prefix_caching=rng.random() < 0.8,
    )
    for _ in range(2):
        assert tokens_of(generate(llm, requests)) == qwen3(requests)
        rng.shuffle(requests)


# ---- randomness ----


def test_same_seed_same_tokens_other_seed_others(qwen3: Reference) -> None:
    prompt = random_prompt(20, seed=30)
    requests = [Request(prompt, SamplingParams(seed=seed, max_tokens=16)) for seed in (1, 2, 1, 2**63 - 1, 0)]
    one, two, again, largest, zero = tokens_of(generate(make_llm(qwen3.folder), requests))
    assert one == again
    assert len({tuple(tokens) for tokens in (one, two, largest, zero)}) == 4


def test_greedy_does_not_depend_on_the_seed(qwen3: Reference) -> None:
    prompt = random_prompt(20, seed=31)
    requests = [Request(prompt, SamplingParams(temperature=0.0, seed=seed, max_tokens=16)) for seed in (None, 1, 2)]
    first, second, third = tokens_of(generate(make_llm(qwen3.folder), requests))
    assert first == second == third


def test_engine_seed_makes_unseeded_requests_reproducible(qwen3: Reference) -> None:
    requests = [Request(random_prompt(9, seed=32), SamplingParams(max_tokens=16))] * 3

    def run_twice(seed: int | None) -> list[list[int]]:
        llm = make_llm(qwen3.folder, seed=seed)
        return tokens_of(generate(llm, requests)) + tokens_of(generate(llm, requests))

    seeded = run_twice(5)
    assert len({tuple(tokens) for tokens in seeded}) == 6  # each request draws its own
    assert run_twice(5) == seeded
    assert run_twice(6) != seeded
    assert run_twice(None) != run_twice(None)


def test_seeded_requests_draw_nothing_from_the_engine(qwen3: Reference) -> None:
    unseeded = Request(random_prompt(9, seed=33), SamplingParams(max_tokens=12))
    seeded = Request(random_prompt(9, seed=34), SamplingParams(max_tokens=12, seed=3))
    greedy_seeded = Request(random_prompt(9, seed=35), SamplingParams(temperature=0.0, max_tokens=12, seed=4))
    (alone,) = tokens_of(generate(make_llm(qwen3.folder, seed=7), [unseeded]))
    among = tokens_of(generate(make_llm(qwen3.folder, seed=7), [seeded, greedy_seeded, unseeded]))
    assert among == [*qwen3([seeded, greedy_seeded]), alone]


def test_refused_request_does_not_move_the_engines_seeds(qwen3: Reference) -> None:
    request = Request(random_prompt(9, seed=36), SamplingParams(max_tokens=12))
    (expected,) = tokens_of(generate(make_llm(qwen3.folder, seed=8), [request]))
    llm = make_llm(qwen3.folder, seed=8)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        llm.generate([list(request.prompt), []], SamplingParams(), use_tqdm=False)
    assert tokens_of(generate(llm, [request])) == [expected]
