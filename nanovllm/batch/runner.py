"""BatchRun: rows in, results out, by one engine."""

import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

from nanovllm.batch.reader import read_rows
from nanovllm.batch.requests import BatchRequest, RowParser
from nanovllm.batch.response import completions_of, error_line, result_line
from nanovllm.batch.results import DoneRows, ResultFile, encode_line
from nanovllm.batch.rows import BadRow, Row, open_row
from nanovllm.batch.statistics import Statistics
from nanovllm.engine.llm_engine import StepResult
from nanovllm.engine.request_feed import Request
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.utils.tokenizer import Refusal


class BatchRun:
    """Runs what of an input is not done yet, and writes each result as it is there.

    Args:
        llm: the engine.
        parser: makes requests of rows.
        results: where to write.
        model: what results call the model.
        created: when the batch was begun, in seconds since 1970.
        on_change: is called after each step and each result that needs none.
    """

    def __init__(
        self,
        llm: LLM,
        parser: RowParser,
        results: ResultFile,
        model: str,
        created: int,
        on_change: Callable[[Statistics], None] = lambda statistics: None,
    ) -> None:
        self._llm = llm
        self._parser = parser
        self._results = results
        self._model = model
        self._created = created
        self._on_change = on_change
        self._in_flight: dict[int, BatchRequest] = {}  # by index in what the engine was given
        self._is_stopping = False
        self.statistics = Statistics()

    def stop(self) -> None:
        """Let the step that runs be the last. May be called by a signal handler."""
        self._is_stopping = True

    def run(self, path: Path, done: DoneRows, window: int = 0) -> bool:
        """Run the rows of an input that are not done.

        Args:
            path: the input.
            done: rows that have a result.
            window: rows to sort by their prompts before they are run, so that equal beginnings meet; 0: none.

        Returns:
            Whether all rows have a result now; not if `stop` was called.

        Raises:
            OSError, ValueError: the input cannot be read, or the output not be written.
        """
        rows = self._rows(path, done)
        ordered = _sort_by_prompt(rows, window) if window else rows
        for told in self._llm.generate_by_step(self._requests(ordered), self._on_step):
            self._write(told)
        self._results.sync()
        return not self._is_stopping

    def _rows(self, path: Path, done: DoneRows) -> Iterator[BatchRequest]:
        """The requests that are left; the results of rows that are none are written on the way."""
        known_ids = CustomIds()
        for input_row in read_rows(path):
            if self._is_stopping:
                return
            row = open_row(input_row)
            if isinstance(row, Row) and not known_ids.add(row.custom_id):
                message = f"custom_id {row.custom_id!r:.80} is that of an earlier row: give each row one of its own"
                row = BadRow(row.number, row.custom_id, "duplicate_custom_id", message)
            if row.number in done:
                continue
            request = self._parser.parse(row) if isinstance(row, Row) else row
            if isinstance(request, BadRow):
                self._write_error(request)
            else:
                yield request

    def _requests(self, rows: Iterator[BatchRequest]) -> Iterator[Request]:
        for index, row in enumerate(rows):
            if self._is_stopping:
                return
            self._in_flight[index] = row
            yield row.request

    def _on_step(self, step: StepResult) -> None:
        self.statistics.add_step(step)
        self._on_change(self.statistics)
        if self._is_stopping:
            scheduler = self._llm.scheduler
            self._llm.abort(seq.seq_id for seq in (*scheduler.running, *scheduler.waiting))

    def _write(self, told: list[tuple[int, RequestOutput | Refusal]]) -> None:
        """Write the results of rows that finished together."""
        lines: list[bytes] = []
        outputs: list[RequestOutput] = []
        for index, output in told:
            row = self._in_flight.pop(index)
            if isinstance(output, Refusal):
                self._write_error(BadRow(row.number, row.custom_id, "invalid_request", str(output)))
            elif all(completion["finish_reason"] != "abort" for completion in completions_of(output)):
                lines.append(encode_line(result_line(row, output, self._model, self._created)))
                outputs.append(output)
        self._results.append(b"".join(lines))
        for output in outputs:
            self.statistics.add_output(output)

    def _write_error(self, bad: BadRow) -> None:
        self._results.append(encode_line(error_line(bad)))
        self.statistics.add_error(bad)
        self._on_change(self.statistics)


class CustomIds:
    """The ids seen so far, in a file: there may be more than memory should hold."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # a file that no one else sees and that goes with us
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def add(self, custom_id: str | int | None) -> bool:
        """Whether it is new; a row without an id always is."""
        if custom_id is None:
            return True
        # 1 and "1" are different, and any text can be encoded: not to bytes that begin with 255.
        key = custom_id.encode("utf-8", "surrogatepass") if isinstance(custom_id, str) else b"\xff%d" % custom_id
        return self._database.execute("INSERT OR IGNORE INTO ids VALUES (?)", (key,)).rowcount == 1


def _sort_by_prompt(rows: Iterator[BatchRequest], window: int) -> Iterator[BatchRequest]:
    """The rows, each `window` of them in the order of their prompts."""
    while batch := list(itertools.islice(rows, window)):
        yield from sorted(batch, key=_sort_key)


def _sort_key(row: BatchRequest) -> str:
    prompt = row.request.prompt
    return prompt if isinstance(prompt, str) else json.dumps(prompt)
