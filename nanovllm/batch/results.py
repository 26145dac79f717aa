"""ResultFile: the output. A line is written as its row finishes; what the file holds is all that is known to be done.

The lines of rows that finish together are written at the end of the file by one call, so that what a run leaves that was
killed is whole lines and perhaps the beginning of one more, without a line feed. That is cut off at the next start.
"""

import fcntl
import json
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import orjson

ROW_ID = "batch_req_{}"  # the id of a line: the row's number, by which a result is known to be there
_ROW_ID = re.compile(r"batch_req_(\d+)")
_SYNC_SECONDS = 5.0  # a crash of the machine, not of the process, may lose what came since


class DoneRows:
    """The numbers of rows that are done: one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self.count = 0

    def __contains__(self, number: int) -> bool:
        byte = number >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (number & 7) & 1)

    def add(self, number: int) -> None:
        """Mark a row."""
        if number in self:
            return
        byte = number >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits)))
        self._bits[byte] |= 1 << (number & 7)
        self.count += 1


class Found(NamedTuple):
    """What an output holds already."""

    done: DoneRows
    num_errors: int


class ResultFile:
    """An output file, locked while it is open: two runs cannot write one file.

    Args:
        path: made if it is missing.

    Raises:
        OSError: it cannot be opened.
        ValueError: another run has it open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise ValueError(f"output {path} is being written by another run: wait for its end, or give another") from None
        self._end = os.lseek(self._fd, 0, os.SEEK_END)  # of the last whole line, once `repair` has seen to it
        self._synced = time.monotonic()

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever written."""
        return self._end == 0

    def clear(self) -> None:
        """Forget all results."""
        os.ftruncate(self._fd, 0)
        self._end = 0

    def repair(self, num_rows: int) -> Found:
        """Read all results, and cut off what is left of a line that was being written.

        Args:
            num_rows: how many rows the input has; a result of another is none.

        Raises:
            ValueError: a line is no result of this command.
        """
        done, num_errors, end = DoneRows(), 0, 0
        with open(self._fd, "rb", closefd=False) as lines:
            lines.seek(0)
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    break
                row, is_error = _read_result(line)
                if row is None or row >= num_rows:
                    if end + len(line) == self._end:
                        break  # the machine went down before it was all on disk
                    raise ValueError(f"line {number} of output {self.path} is no result of this run; --restart starts anew")
                done.add(row)
                num_errors += is_error
                end += len(line)
        os.ftruncate(self._fd, end)
        self._end = end
        return Found(done, num_errors)

    def append(self, lines: bytes) -> None:
        """Write lines, whole ones.

        Raises:
            OSError: not all could be written, such as when the disk is full; then only whole ones are left.
        """
        written = 0
        try:
            while written < len(lines):
                written += os.pwrite(self._fd, lines[written:], self._end + written)
        except BaseException:
            written = lines.rfind(b"\n", 0, written) + 1
            os.ftruncate(self._fd, self._end + written)
            raise
        finally:
            self._end += written
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        os.fsync(self._fd)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Let others have the file."""
        os.close(self._fd)


def encode_line(result: dict[str, Any]) -> bytes:
    """A line of JSON; what is no number there, such as minus infinity, becomes null."""
    try:
        return orjson.dumps(result, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:  # it takes no halves of surrogate pairs, and no ids beyond 64 bits
        return json.dumps(result, separators=(",", ":")).encode() + b"\n"


def _read_result(line: bytes) -> tuple[int | None, bool]:
    """The row's number, None if the line is no result; and whether it is an error."""
    try:
        result = json.loads(line)
        found = _ROW_ID.fullmatch(result["id"])
        return int(found[1]) if found else None, result["error"] is not None
    except (ValueError, KeyError, TypeError):
        return None, False
