"""Batches that are killed, interrupted, or run into a full disk: started again, they end as if nothing had happened."""

import random
import signal
import time
from pathlib import Path

import pytest
from batch_harness import ENGINE, Command, Line, mixed_rows, results, write_rows

NUM_ROWS = 60


class Batch:
    """One input, run in processes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.input = write_rows(folder / "input.jsonl", mixed_rows(NUM_ROWS))

    def start(self, output: Path, *options: str, largest_file: int = 0) -> Command:
        argv = ["batch", self.input, output, "--model", self.model, "--max-num-seqs", "4", *ENGINE, *options]
        return Command(argv, self.folder / f"{output.name}.stderr", largest_file)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory, tiny_text_model: Path) -> Batch:
    return Batch(tmp_path_factory.mktemp("batch"), tiny_text_model)


@pytest.fixture(scope="module")
def expected(batch: Batch) -> dict[str, Line]:
    """What a run gives that nobody disturbs."""
    output = batch.folder / "undisturbed.jsonl"
    assert batch.start(output).wait() == 3
    lines = results(output)
    assert set(lines) == {f"batch_req_{number}" for number in range(NUM_ROWS)}
    assert sum(line["error"] is not None for line in lines.values()) == 6
    return lines


def test_killed_again_and_again(batch: Batch, expected: dict[str, Line]) -> None:
    output = batch.folder / "killed.jsonl"
    rng = random.Random(0)
    size = (batch.folder / "undisturbed.jsonl").stat().st_size
    num_before = 0
    for _ in range(6):
        command = batch.start(output)
        at = rng.choice(["start", "load", "run", "run", "run"])
        if at == "start":
            time.sleep(rng.uniform(0, 0.2))
        else:
            now = output.stat().st_size if output.exists() else 0
            command.wait_for(output, now + 1 + (at == "run") * rng.randint(0, size // 6))
        command.signal(signal.SIGKILL)
        command.wait()
        lines = output.read_bytes().split(b"\n")[:-1] if output.exists() else []
        assert len(lines) >= num_before  # nothing that was there is gone
        num_before = len(lines)
        with output.open("ab") as file:  # a line that was being written
            file.write(b'{"id":"batch_req_0","custom_id":"id-0","resp'[: rng.randint(0, 44)])
    assert 0 < num_before < NUM_ROWS
    assert batch.start(output).wait() == 3
    assert results(output) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_in_order(batch: Batch, expected: dict[str, Line], number: int, code: int) -> None:
    output = batch.folder / f"signal-{number}.jsonl"
    command = batch.start(output, "--report", str(output.with_suffix(".html")))
    command.wait_for(output, 2000)
    command.signal(number)
    assert command.wait() == code
    assert "the same command runs what is left" in command.stderr
    assert "Traceback" not in command.stderr
    assert output.with_suffix(".html").read_text().count("rows left") == 1
    done = results(output)
    assert 0 < len(done) < NUM_ROWS
    assert done.items() <= expected.items()
    assert output.read_bytes().endswith(b"\n")
    if number == signal.SIGINT:
        assert batch.start(output, "--sort-by-prefix").wait() == 3  # in another order, and the same
        assert results(output) == expected


def test_second_interrupt_ends_it_at_once(batch: Batch, expected: dict[str, Line]) -> None:
    output = batch.folder / "twice.jsonl"
    command = batch.start(output)
    command.wait_for(output, 1)
    command.signal(signal.SIGINT)
    command.signal(signal.SIGINT)
    assert command.wait() in (-signal.SIGINT, 130)  # the system may make one of two signals
    assert batch.start(output).wait() == 3
    assert results(output) == expected


def test_full_disk(batch: Batch, expected: dict[str, Line]) -> None:
    output, largest_file = batch.folder / "full.jsonl", 9_000
    command = batch.start(output, largest_file=largest_file)
    assert command.wait() == 1
    assert "File too large" in command.stderr
    assert "the same command goes on" in command.stderr
    content = output.read_bytes()
    longest = max(len(line) for line in (batch.folder / "undisturbed.jsonl").read_bytes().splitlines()) + 1
    assert largest_file - longest <= len(content) <= largest_file  # no line is missing that had room
    assert content.endswith(b"\n")
    assert results(output).items() <= expected.items()
    assert batch.start(output).wait() == 3
    assert results(output) == expected
