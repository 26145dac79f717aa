"""The files of a batch: inputs of every format, outputs that were torn, filled up, or are someone else's."""

import bz2
import errno
import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nanovllm.batch.manifest import Manifest
from nanovllm.batch.reader import InputError, read_rows, survey
from nanovllm.batch.results import DoneRows, ResultFile, encode_line

ROWS = [{"custom_id": f"id-{i}", "prompt": "words " * (i % 50), "max_tokens": i} for i in range(3000)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[:50_000]) + zstandard.compress(data[50_000:]),  # frames may follow frames
}


# ---- inputs ----


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_lines_of_every_compression(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    lines = [*LINES[:1000], b"\n", b" \r\n", *LINES[1000:-1], LINES[-1].rstrip()]  # blank ones are no rows
    path.write_bytes(COMPRESSIONS[suffix](b"".join(lines)))
    rows = list(read_rows(path))
    assert [json.loads(row.content) for row in rows] == ROWS  # type: ignore[arg-type]
    assert [row.number for row in rows] == [*range(1000), *range(1002, 3002)]
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(b"".join(lines))
    assert survey(path) == survey(plain) == (3000, 3002, survey(plain).digest)  # what it holds, not how it is packed
    plain.write_bytes(b"".join([*lines[:-1], b"{}"]))
    assert survey(plain).digest != survey(path).digest


@pytest.mark.parametrize("suffix", [suffix for suffix in COMPRESSIONS if suffix])
@pytest.mark.parametrize("damage", ["cut", "garbled"])
def test_damaged_files_are_said_to_be(suffix: str, damage: str, tmp_path: Path) -> None:
    data = bytearray(COMPRESSIONS[suffix](b"".join(LINES)))
    if damage == "cut":
        del data[-12:]
    else:
        data[len(data) // 2 :] = os.urandom(len(data) // 2)
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"rows\.jsonl\.\w+ is damaged"):
        survey(path)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=700)
    assert [(row.number, row.content) for row in read_rows(path)] == list(enumerate(ROWS))
    assert survey(path)[:2] == (3000, 3000)
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="no Parquet file"):
        survey(path)


@pytest.mark.parametrize(("name", "library"), [("rows.parquet", "pyarrow"), ("rows.jsonl.zst", "zstandard")])
def test_missing_library_is_named(name: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"pip install {library}"):
        survey(tmp_path / name)


# ---- outputs ----


def result(number: int, **fields: Any) -> bytes:
    line = {"id": f"batch_req_{number}", "custom_id": "é\u2028", "response": {"body": "x" * number}, "error": None, **fields}
    return encode_line(line)


def test_done_rows_are_those_that_were_added() -> None:
    done = DoneRows()
    numbers = {0, 7, 8, 9, 1000, 12345}
    for number in [*numbers, 8]:
        done.add(number)
    assert done.count == len(numbers)
    assert {number for number in range(20_000) if number in done} == numbers


def test_torn_last_line_is_cut_off_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole, last = result(0) + result(5, error={"code": "x"}), result(3)
    for length in range(len(last)):
        path.write_bytes(whole + last[:length])
        file = ResultFile(path)
        found = file.repair(num_rows=6)
        assert [number for number in range(9) if number in found.done] == [0, 5]
        assert found.num_errors == 1
        file.append(result(3))
        file.close()
        assert path.read_bytes() == whole + last


def test_line_that_the_machine_lost_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(result(0) + b"\0" * 50 + b"\n")
    file = ResultFile(path)
    assert file.repair(num_rows=6).done.count == 1
    file.close()
    assert path.read_bytes() == result(0)


@pytest.mark.parametrize("line", [b"something\n", b"{}\n", result(99), b'{"id":"x","error":null}\n'])
def test_what_is_no_result_is_left_alone(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    content = result(0) + line + result(1) + b'{"torn'
    path.write_bytes(content)
    file = ResultFile(path)
    with pytest.raises(ValueError, match=r"line 2 of output .*out\.jsonl is no result"):
        file.repair(num_rows=6)
    assert path.read_bytes() == content


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_line_that_could_not_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "out.jsonl"
    file = ResultFile(path)
    file.append(result(0))
    written = 0

    def write(fd: int, data: bytes, place: int, really: Callable[[int, bytes, int], int] = os.pwrite) -> int:
        nonlocal written
        if written == 40:
            raise error
        written += 10
        return really(fd, data[:10], place)

    monkeypatch.setattr(os, "pwrite", write)
    with pytest.raises(type(error)):
        file.append(result(1))
    monkeypatch.undo()
    assert path.read_bytes() == result(0)
    file.append(result(2))
    file.close()
    assert path.read_bytes() == result(0) + result(2)


def test_of_lines_that_could_not_all_be_written_the_whole_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the disk is full."""
    path = tmp_path / "out.jsonl"
    lines = [result(number) for number in range(4)]
    ends = [len(b"".join(lines[:number])) for number in range(5)]
    for room in range(1, ends[-1]):
        file = ResultFile(path)
        file.clear()

        def write(fd: int, data: bytes, place: int, really: Callable[..., int] = os.pwrite, room: int = room) -> int:
            if place >= room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return really(fd, data[: room - place], place)

        with monkeypatch.context() as context:
            context.setattr(os, "pwrite", write)
            with pytest.raises(OSError, match="No space left"):
                file.append(b"".join(lines))
        num_whole = sum(end <= room for end in ends) - 1
        file.append(lines[-1])
        file.close()
        assert path.read_bytes() == b"".join([*lines[:num_whole], lines[-1]])


def test_an_output_has_one_writer(tmp_path: Path) -> None:
    first = ResultFile(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="being written by another run"):
        ResultFile(tmp_path / "out.jsonl")
    first.close()
    ResultFile(tmp_path / "out.jsonl").close()


def test_lines_are_text_that_reads_back() -> None:
    for text in ("é\u2028\n\0", "\ud800 half a pair"):
        line = encode_line({"text": text})
        assert line.count(b"\n") == 1
        assert json.loads(line) == {"text": text}


def test_lines_of_numbers() -> None:
    assert encode_line({"custom_id": 10**30}) == b'{"custom_id":%d}\n' % 10**30
    assert encode_line({"logprob": float("-inf"), "rank": 1}) == b'{"logprob":null,"rank":1}\n'


def test_manifest_tells_what_changed(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    output = tmp_path / "out.jsonl"
    assert Manifest.read(output) is None
    manifest = Manifest.of("digest", checkpoint(), {"temperature": 1.0, "stop": ("a",)})
    manifest.write(output)
    read = Manifest.read(output)
    assert read == manifest
    assert manifest.differences(Manifest.of("digest", checkpoint(), {"temperature": 1.0, "stop": ["a"]})) == []
    other = Manifest.of("other", checkpoint(seed=1), {"temperature": 0.5, "stop": ["a"]})
    assert manifest.differences(other) == [
        "the input has changed",
        "the model has changed",
        "temperature was 1.0 and is 0.5",
    ]
    (tmp_path / "out.jsonl.manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="no manifest"):
        Manifest.read(output)
