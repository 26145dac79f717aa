"""Whatever happens to a rank, the caller is told in time and why, nothing is left, and the engine can be used again."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from scripted import (
    CTRL_C,
    RANK_0_RAISES,
    RANK_0_RAISES_AT_THE_END,
    WORKER_IS_KILLED,
    WORKER_RAISES,
    ScriptedError,
    generate,
    in_time,
    is_alive,
    make_llm,
    scripted,
    workers,
)

from nanovllm import LLM
from nanovllm.engine.workers import WorkerError

CheckpointFactory = Callable[..., Path]


@pytest.fixture(scope="module")
def expected(checkpoint: CheckpointFactory) -> list[list[int]]:
    return generate(make_llm(checkpoint(), 1))


@pytest.fixture(scope="module")
def engine(checkpoint: CheckpointFactory) -> Iterator[LLM]:
    with scripted():
        llm = make_llm(checkpoint(), 2)
        yield llm
    llm.exit()
    llm.exit()
    assert workers() == []
    with pytest.raises(RuntimeError, match="exited"):
        generate(llm)


@pytest.fixture
def llm(engine: LLM, expected: list[list[int]]) -> Iterator[LLM]:
    """An engine that works before, and must work after."""
    assert generate(engine) == expected
    yield engine
    assert generate(engine) == expected
    assert len(workers()) == 1


@pytest.mark.parametrize(
    ("script", "error"), [(CTRL_C, KeyboardInterrupt), (RANK_0_RAISES_AT_THE_END, ScriptedError)], ids=["ctrl-c", "end"]
)
def test_workers_go_on_after_an_error_that_leaves_ranks_together(llm: LLM, script: int, error: type[BaseException]) -> None:
    before = workers()
    with pytest.raises(error):
        generate(llm, script)
    assert workers() == before


def test_rank_0_raises_in_the_middle_of_a_step(llm: LLM) -> None:
    before = workers()
    with in_time(), pytest.raises(ScriptedError, match="in rank 0"):
        generate(llm, RANK_0_RAISES)
    assert not any(map(is_alive, before))


def test_worker_is_killed_in_a_step(llm: LLM) -> None:
    with in_time(), pytest.raises(WorkerError, match=r"rank 1 \(process \d+\) was killed by SIGKILL"):
        generate(llm, WORKER_IS_KILLED)
    assert workers() == []


def test_worker_is_killed_between_steps(llm: LLM) -> None:
    (worker,) = workers()
    worker.kill()
    while is_alive(worker):
        time.sleep(0.01)
    with in_time(), pytest.raises(WorkerError, match="SIGKILL"):
        generate(llm)
    assert workers() == []


def test_worker_raises_among_four(checkpoint: CheckpointFactory) -> None:
    """The others fail in consequence; the error is the one that began it."""
    before, descriptors = workers(), psutil.Process().num_fds()
    with scripted():
        llm = make_llm(checkpoint(), 4)
    assert len(workers()) == len(before) + 3
    with in_time(), pytest.raises(WorkerError, match=r"rank 1 .*\n(.*\n)*.*_play(.*\n)*.*ScriptedError: in a worker"):
        generate(llm, WORKER_RAISES)
    assert workers() == before
    assert psutil.Process().num_fds() == descriptors


# ---- while loading ----


@pytest.mark.parametrize(
    ("loading", "error", "message"),
    [
        ("killed", WorkerError, "killed by SIGKILL"),
        ("raises", WorkerError, "scripted.*\n(.*\n)*.*ScriptedError: while loading"),
        ("user error", ValueError, "the user's mistake"),
        ("long error", WorkerError, "no end of it at last"),
        ("ctrl-c", KeyboardInterrupt, None),
    ],
)
def test_failure_while_loading(
    checkpoint: CheckpointFactory, loading: str, error: type[BaseException], message: str | None
) -> None:
    before, descriptors = workers(), psutil.Process().num_fds()
    with scripted(loading), pytest.raises(error, match=message):
        make_llm(checkpoint(), 2)
    assert workers() == before
    assert psutil.Process().num_fds() == descriptors


def test_ctrl_c_while_workers_start(checkpoint: CheckpointFactory) -> None:
    before = workers()
    interrupter = threading.Thread(target=interrupt_when_there_are_more_workers, args=(len(before),))
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        make_llm(checkpoint(), 4)
    interrupter.join()
    assert workers() == before


def interrupt_when_there_are_more_workers(number: int) -> None:
    while len(workers()) <= number:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_worker_cannot_start(checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with in_time(), pytest.raises(WorkerError, match=r"rank \d .*ended with exit status 1"):
        make_llm(folder, 4)


def test_heads_that_do_not_divide(checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint()
    monkeypatch.setattr(sys, "executable", "/bin/false")  # it is said before any process is started
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 3.* 4 attention heads; 1, 2, 4 would"):
        make_llm(folder, 3)


def test_threads_are_shared_out(checkpoint: CheckpointFactory) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        with scripted("threads"), pytest.raises(ValueError, match="2 threads"):
            make_llm(checkpoint(), 2)
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
