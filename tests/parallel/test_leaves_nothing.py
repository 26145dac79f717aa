"""Processes, files, ports: what an engine of several ranks has while it runs, and that nothing stays when it ends."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from scripted import LIMIT, generate, is_alive, make_llm, workers

CheckpointFactory = Callable[..., Path]

PRELUDE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom scripted import *\n"


@contextmanager
def script(folder: Path, code: str) -> Iterator["subprocess.Popen[str]"]:
    """Runs the code in a new interpreter, without a guard around its main program."""
    source = f"{PRELUDE}folder = {str(folder)!r}\n{textwrap.dedent(code)}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", source], text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def assert_gone(processes: list[psutil.Process]) -> None:
    end = time.monotonic() + LIMIT
    while any(map(is_alive, processes)):
        assert time.monotonic() < end, f"still there: {[process for process in processes if is_alive(process)]}"
        time.sleep(0.05)


def test_two_engines_side_by_side(checkpoint: CheckpointFactory) -> None:
    """And two processes with engines at the same time; neither says a word on its error stream."""
    code = """
        first, second = make_llm(folder, 2), make_llm(folder, 2, kvcache_block_size=32)
        of_first, of_second = ([pid] for pid in sorted(worker.pid for worker in workers()))
        tokens = generate(first)
        assert generate(second) == tokens == generate(first)
        del first
        assert [worker.pid for worker in workers()] == of_second, "del left something"
        assert generate(second) == tokens
        print(*of_first, *of_second, tokens)  # and the interpreter ends without exit()
    """
    with script(checkpoint(), code) as one, script(checkpoint(), code) as other:
        outputs = [process.communicate(timeout=120) for process in (one, other)]
    assert [error for _, error in outputs] == ["", ""]
    expected = generate(make_llm(checkpoint(), 1))
    for output, _ in outputs:
        first, second, tokens = output.split(maxsplit=2)
        assert tokens.strip() == str(expected)
        assert not psutil.pid_exists(int(first))
        assert not psutil.pid_exists(int(second))


@pytest.mark.parametrize("moment", ["loading", "generating"])
def test_parent_is_killed(checkpoint: CheckpointFactory, moment: str) -> None:
    code = """
        llm = make_llm(folder, 2)
        print("generating", flush=True)
        while True:
            generate(llm)
    """
    with script(checkpoint(), code) as process:
        parent = psutil.Process(process.pid)
        while not (children := parent.children()):
            time.sleep(0.05)
        if moment == "generating":
            assert process.stdout is not None
            assert process.stdout.readline() == "generating\n"
        process.send_signal(signal.SIGKILL)
        assert_gone(children)


def test_running_engine_has_no_names_and_no_open_doors(checkpoint: CheckpointFactory) -> None:
    """Memory and rendezvous are anonymous: they cannot be left behind, and no other user can open them."""
    me = psutil.Process()
    before = me.num_fds()
    llm = make_llm(checkpoint(), 2)
    generate(llm)
    (worker,) = workers()
    for process in (me, worker):
        shared = [line for line in (Path("/proc") / str(process.pid) / "maps").read_text().splitlines() if " rw-s " in line]
        assert any("memfd:nanovllm-mailbox" in line for line in shared)
        assert not any("/dev/shm" in line and "(deleted)" not in line for line in shared)
        assert {connection.laddr.ip for connection in process.net_connections()} == {"127.0.0.1"}
    busy = worker.cpu_times()
    time.sleep(0.5)
    assert worker.cpu_times().user - busy.user < 0.2, "it waits by burning the processor"
    llm.exit()
    assert_gone([worker])
    assert me.num_fds() == before
    assert me.net_connections() == []
