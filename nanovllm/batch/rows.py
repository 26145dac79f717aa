"""From a line of the input to the fields of a request.

A row is a line of OpenAI's batch format (`custom_id`, `method`, `url`, `body`), or plain: the fields of a body, and a
`custom_id` if there is one.
"""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from nanovllm.batch.reader import InputRow

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
_ENVELOPE = ("custom_id", "method", "url", "body")
MAX_DEPTH = 100  # of objects and arrays within each other


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no request.

    code: what kind of mistake it is, such as "invalid_json".
    message: what is wrong, and what would be right.
    """

    number: int
    custom_id: str | int | None
    code: str
    message: str


class Row(NamedTuple):
    """A row as it was read: its fields are those of the body, or of a plain row."""

    number: int
    custom_id: str | int | None
    fields: dict[str, Any]


def open_row(row: InputRow) -> Row | BadRow:
    """Read the row as far as its custom_id."""
    try:
        content = _read_json(row.content) if isinstance(row.content, bytes) else row.content
    except ValueError as error:
        return BadRow(row.number, None, "invalid_json", f"the row is not JSON: {error}")
    if not isinstance(content, dict):
        return BadRow(row.number, None, "invalid_row", f"the row must be an object, got {type(content).__name__}")
    custom_id = content.get("custom_id")
    is_plain = content.get("body") is None and content.get("url") is None
    try:
        _check_custom_id(custom_id, is_plain)
        fields = without_nulls(content) if is_plain else _check_envelope(content)
    except (TypeError, ValueError) as error:
        known_id = custom_id if isinstance(custom_id, (str, int)) else None
        return BadRow(row.number, known_id, "invalid_request", str(error))
    if is_plain:
        fields.pop("custom_id", None)
    return Row(row.number, custom_id, fields)


def _read_json(text: bytes | str) -> Any:
    """What it holds, if that is not so deep that Python may fail to compare or to show it."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    brackets: Any = b"[{" if isinstance(text, bytes) else "[{"
    if sum(map(text.count, brackets)) > MAX_DEPTH:
        level = [value]
        for _ in range(MAX_DEPTH):
            members = (one.values() if isinstance(one, dict) else one for one in level)
            level = [inner for outer in members for inner in outer if isinstance(inner, (list, dict))]
        if level:
            raise ValueError(f"its values are nested deeper than {MAX_DEPTH} levels")
    return value


def _check_custom_id(custom_id: object, is_plain: bool) -> None:
    if isinstance(custom_id, str) or (is_plain and (custom_id is None or type(custom_id) is int)):
        return
    raise TypeError(f"custom_id must be a string, got {custom_id!r:.80}")


def _check_envelope(content: dict[str, Any]) -> dict[str, Any]:
    """The body of a row in OpenAI's format."""
    for name in content:
        if name not in _ENVELOPE:
            raise ValueError(f"unknown field {name!r} beside body; known are {', '.join(_ENVELOPE)}")
    if content.get("method", "POST") != "POST":
        raise ValueError(f"method must be 'POST', got {content['method']!r:.80}")
    url, body = content.get("url"), content.get("body")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise ValueError(f"url must be {CHAT_URL!r} or {COMPLETIONS_URL!r}, got {url!r:.80}")
    if isinstance(body, str):
        body = _read_json(body)  # a column of a Parquet file has one type; bodies may differ
    if not isinstance(body, dict):
        raise TypeError(f"body must be an object, got {type(body).__name__}")
    body = without_nulls(body)
    wanted, other = ("messages", "prompt") if url == CHAT_URL else ("prompt", "messages")
    if wanted not in body or other in body:
        raise ValueError(f"the body of a request to {url} must have {wanted}" + f", not {other}" * (other in body))
    return body


def without_nulls(given: dict[str, Any]) -> dict[str, Any]:
    """Null is OpenAI's, and Parquet's, way to leave a field out."""
    return {name: value for name, value in given.items() if value is not None}
