"""Rows of an input file, one after another: JSON Lines, plain or compressed, and Parquet. No file is held in memory."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

_PARQUET_ROWS = 1024  # read at a time
_HASHED_BYTES = 2**20  # read at a time
_ZSTD_BYTES = 2**14  # decompressed at a time: they may become a thousand times as many
_OPENERS: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class InputError(ValueError):
    """An input that cannot be read to its end, whatever is in its rows."""


class InputRow(NamedTuple):
    """One row of the input.

    number: which of the file's lines or rows, from 0. Lines that are blank have numbers, but are no rows.
    content: a line of JSON, or what Parquet's columns hold.
    """

    number: int
    content: bytes | dict[str, Any]


class Survey(NamedTuple):
    """What one look through an input finds.

    num_rows: rows in it.
    end: the largest row number and one.
    digest: tells contents apart, not names: 32 hexadecimal digits.
    """

    num_rows: int
    end: int
    digest: str


def survey(path: Path) -> Survey:
    """Read an input through, to count its rows and to know it again.

    Raises:
        OSError: it cannot be read.
        InputError: it is damaged, or of a format whose library is not installed.
    """
    digest = xxhash.xxh3_128()
    if path.suffix == ".parquet":
        with _open_parquet(path) as parquet:
            num_rows: int = parquet.metadata.num_rows
        with path.open("rb") as file:
            while part := file.read(_HASHED_BYTES):
                digest.update(part)
        return Survey(num_rows, num_rows, digest.hexdigest())
    num_rows, end = 0, 0
    for line in _read_lines(path):
        num_rows += not line.isspace()
        end += 1
        digest.update(line)
    return Survey(num_rows, end, digest.hexdigest())


def read_rows(path: Path) -> Iterator[InputRow]:
    """The rows of an input, in order.

    Raises:
        As `survey`.
    """
    if path.suffix != ".parquet":
        yield from (InputRow(number, line) for number, line in enumerate(_read_lines(path)) if not line.isspace())
        return
    with _open_parquet(path) as parquet:
        number = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_ROWS):
            for content in batch.to_pylist():
                yield InputRow(number, content)
                number += 1


def _read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, each with its line feed."""
    try:
        if path.suffix == ".zst":
            yield from _read_zstd_lines(path)
            return
        opened = _OPENERS.get(path.suffix, open)(path, "rb")
        with opened as lines:
            yield from lines
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"input {path} is damaged: {error}") from error
    except OSError as error:
        if error.errno is not None:  # else it is a decompressor's
            raise
        raise InputError(f"input {path} is damaged: {error}") from error


def _read_zstd_lines(path: Path) -> Iterator[bytes]:
    """As zstandard's own reader, which takes the end of the file for the end of a frame wherever it comes."""
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"input {path} needs a library: pip install zstandard") from error
    frame, within, rest = zstandard.ZstdDecompressor().decompressobj(), False, b""
    with path.open("rb") as file:
        while part := file.read(_ZSTD_BYTES):
            while part:
                try:
                    *lines, rest = (rest + frame.decompress(part)).split(b"\n")
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                yield from (line + b"\n" for line in lines)
                part, within = frame.unused_data if frame.eof else b"", not frame.eof
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if within:
        raise EOFError("its last frame is cut off")
    if rest:
        yield rest


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"input {path} needs a library: pip install pyarrow") from error
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"input {path} is no Parquet file: {error}") from error
