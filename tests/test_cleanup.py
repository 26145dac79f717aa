"""After any exception the engine has no request left over, all blocks are free, and the next call works.

Exceptions come from the model, the sampler, poisoned weights and, most of all, Ctrl-C, which Python may raise between any
two operations: before and after each thing that changes state, and at every line of the engine's code.
"""

import ast
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextvars import copy_context
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.models.qwen3 import Qwen3Model
from nanovllm.utils.context import get_forward_context

CheckpointFactory = Callable[..., Path]
Drive = Callable[[LLM], list[list[int]]]
Location = tuple[str, int]  # file and line

PACKAGE = str(Path(nanovllm.__file__).parent)
NUM_BLOCKS = 6
# Two prompts share a prefix; together they need more blocks than there are, so that one is preempted.
PROMPTS = [random.Random(0).choices(range(320), k=30)]
PROMPTS += [PROMPTS[0][:16] + random.Random(1).choices(range(320), k=16), random.Random(2).choices(range(320), k=31)]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=6),
    SamplingParams(temperature=0.9, seed=1, max_tokens=4),
    SamplingParams(temperature=0.0, max_tokens=4),
]


def forget(llm: LLM) -> None:
    """Back to the state after an error, a cold cache included, from which equal work makes equal calls."""
    llm.scheduler.reset()


class PlannedError(Exception):
    """What the tests raise."""


def make_llm(folder: Path, **options: object) -> LLM:
    defaults: dict[str, object] = {
        "max_model_len": 64,
        "num_kvcache_blocks": NUM_BLOCKS,
        "kvcache_block_size": 16,
        "max_num_batched_tokens": 40,
        "max_num_seqs": 3,
        "device": "cpu",
        "dtype": "float32",
    }
    return LLM(folder, **{**defaults, **options})


def by_generate(llm: LLM) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def by_completion(llm: LLM) -> list[list[int]]:
    outputs: Any = dict(llm.generate_as_completed(zip(PROMPTS, PARAMS, strict=True)))
    return [outputs[index]["token_ids"] for index in range(len(PROMPTS))]


def by_step(llm: LLM) -> list[list[int]]:
    ids = [llm.add_request(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    finished = step_to_the_end(llm)
    return [finished[seq_id] for seq_id in ids]


def step_to_the_end(llm: LLM) -> dict[int, list[int]]:
    finished: dict[int, list[int]] = {}
    while not llm.is_finished():
        finished.update(llm.step()[0])
    return finished


def runner_of(llm: LLM) -> ModelRunner:
    runner: ModelRunner = llm.executor._runner  # type: ignore[attr-defined]
    return runner


def run_layer_by_layer(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the layers run one after the other where many of them would be one call."""
    monkeypatch.setattr(type(runner_of(llm).model.model), "run_layers", Qwen3Model.run_layers)


def assert_clean(llm: LLM) -> None:
    """Nothing is left of any request, in the scheduler, the cache, or the forward context; all rows are free."""
    manager = llm.scheduler.block_manager
    assert llm.is_finished()
    assert manager.num_free_blocks == manager.num_blocks
    assert all(block.ref_count == 0 for block in manager.blocks)
    assert len(llm.scheduler.running) == 0
    assert sorted(llm.scheduler.running.free_rows) == [0, 1, 2]
    with pytest.raises(RuntimeError, match="forward context"):
        get_forward_context()
    assert not torch.is_inference_mode_enabled()
    assert llm.step() == ([], 0)


class Interrupter:
    """A method that raises at its n-th call, before or after doing its work."""

    def __init__(self, method: Callable[..., Any], at_call: int, after: bool, error: BaseException) -> None:
        self._method = method
        self._at_call = at_call
        self._after = after
        self._error = error
        self.num_calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        if self.num_calls == self._at_call and not self._after:
            raise self._error
        result = self._method(*args, **kwargs)
        if self.num_calls == self._at_call:
            raise self._error
        return result


def drive_broken(drive: Drive, llm: LLM, owner: object, name: str, method: Callable[..., Any]) -> list[list[int]]:
    """Drive the engine while `method` stands in for the one called `name`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, method)
        return drive(llm)


@pytest.fixture(scope="module")
def expected(checkpoint: CheckpointFactory) -> list[list[int]]:
    return by_generate(make_llm(checkpoint(), num_kvcache_blocks=20, max_num_batched_tokens=1000))


@pytest.fixture
def llm(checkpoint: CheckpointFactory, expected: list[list[int]]) -> Iterator[LLM]:
    """An engine that has worked before, and must work after."""
    engine = make_llm(checkpoint())
    assert by_generate(engine) == expected
    assert engine.scheduler.num_preemptions > 0
    yield engine
    assert by_generate(engine) == expected
    assert by_step(engine) == expected


drivers = pytest.mark.parametrize("drive", [by_generate, by_step])


# ---- errors of the model and the sampler ----


@drivers
@pytest.mark.parametrize("at_call", [1, 2, 4, 6])
@pytest.mark.parametrize("method", ["forward", "compute_logits"])
def test_error_in_the_model(llm: LLM, drive: Drive, method: str, at_call: int) -> None:
    model = runner_of(llm).model
    broken = Interrupter(getattr(model, method), at_call, after=False, error=PlannedError("the model broke"))
    with pytest.raises(PlannedError, match="the model broke"):
        drive_broken(drive, llm, model, method, broken)
    assert_clean(llm)


@drivers
@pytest.mark.parametrize("layer", [0, 1])
def test_error_inside_a_layer(llm: LLM, drive: Drive, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # K and V of some layers have been written then, of others not.
    run_layer_by_layer(llm, monkeypatch)
    attention = runner_of(llm).model.model.layers[layer].self_attn
    broken = Interrupter(attention.forward, at_call=4, after=True, error=PlannedError())
    with pytest.raises(PlannedError):
        drive_broken(drive, llm, attention, "forward", broken)
    assert_clean(llm)


@drivers
@pytest.mark.parametrize("at_call", [1, 4])
@pytest.mark.parametrize("after", [False, True])
def test_error_in_the_sampler(llm: LLM, drive: Drive, at_call: int, after: bool) -> None:
    sampler = runner_of(llm).sampler
    broken = Interrupter(sampler.forward, at_call, after, PlannedError())
    with pytest.raises(PlannedError):
        drive_broken(drive, llm, sampler, "forward", broken)
    assert_clean(llm)


def test_errors_one_after_another(llm: LLM) -> None:
    model = runner_of(llm).model
    for at_call in (3, 1, 5, 2, 4):
        broken = Interrupter(model.forward, at_call, after=True, error=PlannedError())
        with pytest.raises(PlannedError):
            drive_broken(by_generate, llm, model, "forward", broken)
        assert_clean(llm)


def test_nothing_is_cached_of_what_was_dropped(llm: LLM) -> None:
    model = runner_of(llm).model
    broken = Interrupter(model.forward, at_call=5, after=False, error=PlannedError())
    with pytest.raises(PlannedError):
        drive_broken(by_generate, llm, model, "forward", broken)
    outputs = llm.generate(PROMPTS[:1], PARAMS[:1], use_tqdm=False)
    assert outputs[0]["num_cached_tokens"] == 0


# ---- weights that are not sound ----


@pytest.fixture
def poison(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, float], None]:
    """Call with a token and a value to put in the place of its embedding."""
    table = runner_of(llm).model.model.embed_tokens
    sound = table.look_up

    def put(token: int, value: float) -> None:
        monkeypatch.setattr(table, "look_up", lambda ids: sound(ids).masked_fill((ids == token).unsqueeze(-1), value))

    return put


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unsound_logits_name_the_request(
    llm: LLM, poison: Callable[[int, float], None], expected: list[list[int]], value: float, temperature: float
) -> None:
    poison(319, value)
    good = [token % 319 for token in PROMPTS[0]]
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=4)
    ids = [llm.add_request(prompt, params) for prompt in ([1, 2], [*good, 319], [3])]
    with pytest.raises(FloatingPointError, match=rf"request {ids[1]} are NaN or infinite") as caught:
        step_to_the_end(llm)
    assert "weights" in str(caught.value)
    assert_clean(llm)
    # The others run, though the cache still holds what was written for the bad one.
    outputs = llm.generate([[1, 2], good, [3]], params, use_tqdm=False)
    assert all(len(output["token_ids"]) == 4 for output in outputs)


def test_unsound_logits_in_generate(llm: LLM, poison: Callable[[int, float], None]) -> None:
    poison(PROMPTS[2][-1], float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        by_generate(llm)
    assert_clean(llm)


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_nan_in_blocks_that_were_never_written(
    checkpoint: CheckpointFactory, expected: list[list[int]], enable_prefix_caching: bool
) -> None:
    llm = make_llm(checkpoint(), enable_prefix_caching=enable_prefix_caching)
    for layer_cache in runner_of(llm).kv_cache:
        layer_cache.fill_(float("nan"))
    assert by_generate(llm) == expected


# ---- Ctrl-C ----

INTERRUPTED_METHODS = [
    "scheduler.add",
    "scheduler.schedule",
    "scheduler._make_room",
    "scheduler._preempt_newest",
    "scheduler._admit",
    "scheduler._start",
    "scheduler.running.add",
    "scheduler.running.remove",
    "scheduler.running.add_tokens",
    "scheduler.update",
    "scheduler._finish",
    "scheduler.block_manager.find_prefix",
    "scheduler.block_manager.allocate",
    "scheduler.block_manager.extend",
    "scheduler.block_manager.free",
    "scheduler.block_manager._take_free_block",
    "scheduler.block_manager.publish",
    "scheduler.block_manager._publish_block",
    "scheduler.block_manager._hash_function",
    "executor.execute",
    "executor._runner.execute",
    "executor._runner._forward",
    "executor._runner.input_batch.apply",
    "executor._runner.input_batch._start",
    "executor._runner.input_batch.append",
    "executor._runner.model.forward",
    "executor._runner.model.model.run_layers",
    "executor._runner.model.compute_logits",
    "executor._runner.backend.store",
    "executor._runner.backend.attend",
]


def find(llm: LLM, path: str) -> tuple[Any, str]:
    """The object that owns the method at `path`, and the method's name."""
    owner: Any = llm
    *steps, name = path.split(".")
    for step in steps:
        owner = getattr(owner, step)
    return owner, name


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("path", INTERRUPTED_METHODS)
def test_interrupt_at_every_call(
    llm: LLM, expected: list[list[int]], path: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "backend" in path:
        run_layer_by_layer(llm, monkeypatch)
    for drive in (by_generate, by_step):
        if drive is by_step and path == "scheduler.add":
            continue  # an interrupt in add_request says nothing of the requests before it
        forget(llm)
        at_call = 0
        while True:
            at_call += 1
            owner, name = find(llm, path)
            method = Interrupter(getattr(owner, name), at_call, after, KeyboardInterrupt())
            try:
                tokens = drive_broken(drive, llm, owner, name, method)
            except KeyboardInterrupt:
                assert_clean(llm)
            else:
                break
        assert tokens == expected
        assert method.num_calls == at_call - 1 > 0  # every one of its calls was interrupted once


@drivers
def test_real_signal_in_the_forward_pass(llm: LLM, drive: Drive) -> None:
    model = runner_of(llm).model
    forward = model.forward
    num_calls = 0

    def forward_and_ctrl_c(*args: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 4:
            signal.raise_signal(signal.SIGINT)
        return forward(*args)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            drive_broken(drive, llm, model, "forward", forward_and_ctrl_c)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_clean(llm)


def is_traced(code_file: str) -> bool:
    """The engine and the forward context; not the layers, which change nothing that outlives a step."""
    file = code_file.removeprefix(PACKAGE)
    return file != code_file and file.startswith(
        ("/engine", "/llm.py", "/utils/context.py", "/utils/progress.py", "/utils/tokenizer.py")
    )


def run_traced(action: Callable[[], object], at_line: Callable[[Location], None]) -> None:
    """Run with `at_line` called before each line of the engine's code; what it raises is raised there."""

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        if not is_traced(frame.f_code.co_filename):
            return None
        if event == "line":
            at_line((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(before)


@cache
def cleanup_lines(file: str) -> frozenset[int]:
    """The lines in `finally`. Python asks for signals after calls, not before the first of a `finally`."""
    tries = [node for node in ast.walk(ast.parse(Path(file).read_text())) if isinstance(node, ast.Try)]
    bodies = [statement for node in tries for statement in node.finalbody]
    return frozenset(line for body in bodies for line in range(body.lineno, (body.end_lineno or 0) + 1))


def interrupt_at_every_line(
    llm: LLM,
    prepare: Callable[[], object],
    action: Callable[[], object],
    is_well: Callable[[], bool],
    files: tuple[str, ...] = (".py",),
) -> set[str]:
    """Interrupt `action` before each line of `files` that it comes to, the first and the last time it comes there.

    Returns:
        The lines at which an interrupt leaves the engine in a state that is not well.
    """
    counts: dict[Location, int] = {}

    def count(line: Location) -> None:
        counts[line] = counts.get(line, 0) + 1

    def is_well_after(target: Location, occurrence: int) -> bool:
        seen = 0

        def stop(line: Location) -> None:
            nonlocal seen
            seen += line == target
            if seen == occurrence:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_traced(action, stop)
        return is_well()

    forget(llm)
    prepare()
    run_traced(action, count)
    ill = set()
    for (file, line), number in counts.items():
        for occurrence in {1, number} if file.endswith(files) and line not in cleanup_lines(file) else ():
            forget(llm)
            prepare()
            # Each in a context of its own, so that one that leaves its forward context behind does not blame the next.
            if not copy_context().run(is_well_after, (file, line), occurrence):
                ill.add(f"{file.removeprefix(PACKAGE)}:{line}")
    forget(llm)
    return ill


def is_clean(llm: LLM) -> bool:
    try:
        assert_clean(llm)
    except (AssertionError, pytest.fail.Exception):
        return False
    return True


def test_interrupt_at_every_line_of_generate(llm: LLM) -> None:
    ill = interrupt_at_every_line(llm, lambda: None, lambda: by_generate(llm), lambda: is_clean(llm))
    assert sorted(ill) == []


def test_interrupt_at_every_line_of_generate_as_completed(llm: LLM) -> None:
    """Of what is not `generate`'s too."""
    files = ("/llm.py", "/engine/request_feed.py", "/utils/tokenizer.py")
    ill = interrupt_at_every_line(llm, lambda: None, lambda: by_completion(llm), lambda: is_clean(llm), files)
    assert sorted(ill) == []


def test_interrupt_at_every_line_of_step(llm: LLM, expected: list[list[int]]) -> None:
    """An interrupt before a step did anything may leave the requests as they were, but none may lose what it finished."""
    ids: list[int] = []
    finished: dict[int, list[int]] = {}

    def prepare() -> None:
        finished.clear()
        ids[:] = [llm.add_request(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]

    def action() -> None:
        for _ in range(7):
            finished.update(llm.step()[0])

    def is_well() -> bool:
        if is_clean(llm):
            return True
        finished.update(step_to_the_end(llm))
        return [finished.get(seq_id) for seq_id in ids] == expected and is_clean(llm)

    assert sorted(interrupt_at_every_line(llm, prepare, action, is_well)) == []
