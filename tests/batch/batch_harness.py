"""What the tests of batches share: rows, and the command in a process of its own that can be killed.

Processes are forked from a server that has imported everything once, so that starting one takes no seconds.
"""

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm.cli import main

ENGINE = ["--device", "cpu", "--dtype", "float32", "--num-kvcache-blocks", "32", "--max-model-len", "128"]
LIMIT = 60.0  # seconds that nothing here should take

Line = dict[str, Any]


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """JSON Lines; strings as they are."""
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def openai_row(custom_id: str, **body: Any) -> Line:
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def mixed_rows(number: int) -> list[object]:
    """Texts and chats, greedy and drawn, seeded or not, one or more completions; and some that cannot run."""
    rows: list[object] = []
    for i in range(number):
        body: Line = {"max_tokens": 4 + i % 9, "temperature": 0.8 if i % 3 else 0.0}
        if i % 4 == 1:
            body["n"] = 2 if body["temperature"] else 1
        if i % 5 == 2:
            body["seed"] = i
        prompt = f"Row {i} says {i * i}"
        rows.append(openai_row(f"id-{i}", messages=[{"role": "user", "content": prompt}], **body) if i % 2 else None)
        rows[-1] = rows[-1] or openai_row(f"id-{i}", prompt=prompt, **body)
        if i % 10 == 7:
            rows[-1] = ["{torn", openai_row("id-3", prompt="again"), {"prompt": "x", "max_token": 3}][i // 10 % 3]
    return rows


def read_lines(output: Path) -> list[Line]:
    return [json.loads(line) for line in output.read_bytes().splitlines()]


def results(output: Path) -> dict[str, Line]:
    """The lines by their id, without the time when the batch was begun; none may be there twice."""
    lines = read_lines(output)
    for line in lines:
        if line["response"]:
            assert line["response"]["body"].pop("created") > 1.6e9
    by_id = {line["id"]: line for line in lines}
    assert len(by_id) == len(lines), "a row was done twice"
    return by_id


def _run_main(argv: list[str], stderr: str, largest_file: int) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  # for as long as the process lives
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    code = main(argv)
    sys.stderr.flush()
    os._exit(code)


class Command:
    """`nanovllm ARGV` in a process of its own."""

    def __init__(self, argv: Sequence[object], stderr: Path, largest_file: int = 0) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nanovllm.cli", "transformers.models.auto.modeling_auto", "torch._dynamo"])
        self._stderr = stderr
        self.process = context.Process(target=_run_main, args=([str(one) for one in argv], str(stderr), largest_file))
        self.process.start()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """The exit code; negative after a signal."""
        self.process.join(LIMIT)
        assert self.process.exitcode is not None, f"it goes on and on: {self.stderr}"
        return self.process.exitcode

    def wait_for(self, output: Path, num_bytes: int) -> None:
        """Until the output is that long or the process has ended."""
        end = time.monotonic() + LIMIT
        while self.process.is_alive() and (not output.exists() or output.stat().st_size < num_bytes):
            assert time.monotonic() < end, self.stderr
            time.sleep(0.002)

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()
