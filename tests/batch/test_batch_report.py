"""The report: its numbers, and how a browser shows it where there is one."""

import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest

from nanovllm.batch.report import render_report, write_report
from nanovllm.batch.rows import BadRow
from nanovllm.batch.statistics import MAX_BINS, MAX_EXAMPLES, Outcome, Statistics
from nanovllm.engine.llm_engine import StepResult
from nanovllm.outputs import RequestOutput


def make_output(num_prompt_tokens: int, num_cached_tokens: int, num_tokens: int) -> RequestOutput:
    return {
        "text": "",
        "token_ids": [1] * num_tokens,
        "finish_reason": "stop",
        "stop_reason": None,
        "logprobs": None,
        "num_prompt_tokens": num_prompt_tokens,
        "num_cached_tokens": num_cached_tokens,
        "time_to_first_token": 0.1,
        "total_time": 0.2,
        "prompt_logprobs": None,
    }


def step(seconds: float, tokens: int = 10) -> StepResult:
    return StepResult([], num_prefill_tokens=tokens, num_decode_tokens=2, num_seqs=4, kv_usage=0.5, seconds=seconds)


@pytest.fixture
def outcome() -> Outcome:
    rng = Random(0)
    statistics = Statistics(start=time.monotonic() - 300)
    for place in range(3000):
        statistics.start = time.monotonic() - 0.1 * place
        statistics.add_step(step(0.08, rng.randint(0, 200)))
    for _ in range(1234):
        statistics.add_output(make_output(rng.randint(1, 900), 1, rng.randint(1, 300)))
    for number in range(40):
        statistics.add_error(
            BadRow(number, f"<b>{number}</b>", "invalid_request", 'the "prompt" \ud800 is <script>bad</script>')
        )
    return Outcome("my <rows>.jsonl, model", statistics, num_rows=5000, num_done=2274, num_errors=40)


class Page(HTMLParser):
    """Its text, and that every element is closed in order."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_page_is_whole_and_needs_nothing_else(outcome: Outcome) -> None:
    page = Page(render_report(outcome))
    assert page.open == []
    assert page.tags.count("svg") == 5
    assert not {"script", "link", "img", "iframe", "b"} & set(
        page.tags
    )  # nothing loaded, nothing of the rows taken for HTML
    assert not [value for name, value in page.attributes if name in ("src", "href", "onload")]
    assert "http" not in "".join(value or "" for _, value in page.attributes)
    for number in ("2,274", "of 5,000", "1,000 before", "2,726 rows left", "my <rows>.jsonl", "1,234", "<script>bad"):
        assert number in page.text
    assert page.text.count("<b>") == MAX_EXAMPLES
    assert all(part not in page.text for part in ("nan", "inf "))


def test_page_of_nothing(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", Outcome("nothing", Statistics(), 0, 0, 0))
    page = Page((tmp_path / "r.html").read_text())
    assert page.open == []
    assert "complete" in page.text


def test_timeline_is_bounded_and_loses_nothing(outcome: Outcome) -> None:
    statistics = Statistics()
    steps = [step(seconds, tokens) for seconds, tokens in ((0.1, 7), (0.2, 11), (40.0, 400), (0.1, 1))]
    for place in range(2000):
        statistics.start = time.monotonic() - 41 - 0.9 * place
        statistics.add_step(steps[place % len(steps)])
    assert len(statistics.bins) <= MAX_BINS
    assert len(statistics.bins) * statistics.bin_seconds >= 1800
    assert sum(one.prefill_tokens for one in statistics.bins) == pytest.approx(419 * 500)
    assert sum(one.busy_seconds for one in statistics.bins) == pytest.approx(40.4 * 500)
    assert sum(one.kv_seconds for one in statistics.bins) == pytest.approx(20.2 * 500)


def test_a_long_step_is_spread_over_its_time() -> None:
    statistics = Statistics(start=time.monotonic() - 10)
    statistics.add_step(step(5.0, 1000))
    speeds = [one.prefill_tokens for one in statistics.bins]
    assert sum(speed > 0 for speed in speeds) in (20, 21)
    assert max(speeds) == pytest.approx(50)


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


def test_a_browser_shows_it(outcome: Outcome, tmp_path: Path) -> None:
    """Where there is no browser, only that there is a page to show."""
    page = tmp_path / "report.html"
    write_report(page, outcome)
    program = browser()
    if program is None:
        assert page.stat().st_size > 5000
        return
    common = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1400"]
    common += [f"--user-data-dir={tmp_path / 'profile'}"]
    blank = tmp_path / "blank.html"
    blank.write_text("<!DOCTYPE html><html><body></body></html>")
    for name in (blank, page):
        arguments = [*common, f"--screenshot={name.with_suffix('.png')}", "--enable-logging=stderr", name.as_uri()]
        ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
        assert "CONSOLE" not in ended.stderr  # no complaint about the page
    # Pictures are compressed: one with curves, bars and numbers is many times as long as a blank one.
    assert page.with_suffix(".png").stat().st_size > 8 * blank.with_suffix(".png").stat().st_size
    dom = subprocess.run([*common, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert re.search(r'class="number">2,274<', dom.stdout)
