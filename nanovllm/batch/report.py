"""The report of a batch: one page of HTML that needs nothing else, drawn with inline SVG."""

import html
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from nanovllm.batch.charts import Series, bar_chart, time_chart
from nanovllm.batch.progress import percent
from nanovllm.batch.rows import BadRow
from nanovllm.batch.statistics import Outcome, Statistics, TimeBin

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --text: #1c2430; --dim: #66707f; --line: #e3e7ec;
  --a: #2563eb; --b: #ea8a0b; --bad: #c8321f; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b212a; --text: #e6eaf0; --dim: #94a0b0;
  --line: #2c3541; --a: #6ea8ff; --b: #f5b04c; --bad: #ff7b6b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 48px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 15px; margin: 0 0 10px; }
.dim { color: var(--dim); } .bad { color: var(--bad); }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); margin: 20px 0 16px; }
.two { grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); margin: 16px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; }
.number { font-size: 21px; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.25; }
section.card { margin: 16px 0; } .two section.card { margin: 0; }
svg { display: block; width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--dim); } svg .grid-line { stroke: var(--line); }
.a { fill: var(--a); } .b { fill: var(--b); }
path.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } path.line.a { stroke: var(--a); }
path.line.b { stroke: var(--b); } path.area { opacity: 0.13; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin: 0 5px 0 12px; }
.key.a { background: var(--a); } .key.b { background: var(--b); }
table { width: 100%; border-collapse: collapse; } td, th { text-align: left; padding: 6px 12px 6px 0; vertical-align: top;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; } th { border: 0; color: var(--dim); font-weight: 500; }
td:first-child, th { white-space: nowrap; }
td:first-child { width: 1%; padding-right: 24px; font-variant-numeric: tabular-nums; }
"""


def write_report(path: Path, outcome: Outcome) -> None:
    """Write the page.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(render_report(outcome), encoding="utf-8")


def render_report(outcome: Outcome) -> str:
    """The page as HTML."""
    statistics = outcome.statistics
    title = html.escape(outcome.title)
    state = "complete" if outcome.num_done == outcome.num_rows else f"{outcome.num_rows - outcome.num_done:,} rows left"
    parts = [
        f"<h1>{title}</h1>",
        f'<div class="dim">{time.strftime("%Y-%m-%d %H:%M:%S")}, {_duration(statistics.seconds)}, {state}</div>',
        _numbers(outcome),
        _timeline(statistics),
        '<div class="grid two">',
        _lengths("Prompt lengths", statistics.prompt_lengths, "a", "rows"),
        _lengths("Output lengths", statistics.output_lengths, "b", "completions"),
        "</div>",
        _endings(statistics),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = "\n".join(parts)
    page = f'<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>'
    return f"<!DOCTYPE html>\n{page}\n"


def _numbers(outcome: Outcome) -> str:
    statistics = outcome.statistics
    seconds = max(statistics.seconds, 1e-9)
    done_before = outcome.num_done - statistics.num_rows
    cells = [
        ("rows done", f"{outcome.num_done:,}", f"of {outcome.num_rows:,}" + f", {done_before:,} before" * (done_before > 0)),
        ("errors", f"{outcome.num_errors:,}", percent(outcome.num_errors, outcome.num_done) + " of rows"),
        ("output tokens", _count(statistics.output_tokens), f"{statistics.output_tokens / seconds:,.0f} a second"),
        ("prompt tokens", _count(statistics.prompt_tokens), f"{statistics.prompt_tokens / seconds:,.0f} a second"),
        ("cache hits", percent(statistics.cached_tokens, statistics.prompt_tokens), "of prompt tokens"),
        ("rows a second", f"{statistics.num_rows / seconds:,.1f}", "in this run"),
    ]
    cards = "".join(
        f'<div class="card"><div class="dim">{name}</div><div class="number">{number}</div>'
        f'<div class="dim">{note}</div></div>'
        for name, number, note in cells
    )
    return f'<div class="grid">{cards}</div>'


def _timeline(statistics: Statistics) -> str:
    width = statistics.bin_seconds

    def curve(name: str, css: str, value: Callable[[TimeBin], float]) -> Series:
        return Series(name, css, [value(one) for one in statistics.bins])

    def mean(total: float, one: TimeBin) -> float:
        return total / one.busy_seconds if one.busy_seconds else 0.0

    charts = [
        (
            "Tokens a second",
            [
                curve("prefill", "a", lambda one: one.prefill_tokens / width),
                curve("decode", "b", lambda one: one.decode_tokens / width),
            ],
            None,
        ),
        ("Sequences in a step", [curve("batch size", "a", lambda one: mean(one.seq_seconds, one))], None),
        ("KV cache in use, %", [curve("use", "b", lambda one: 100 * mean(one.kv_seconds, one))], 100.0),
    ]
    return "".join(
        f'<section class="card"><h2>{title}{_keys(series)}</h2>{time_chart(series, width, top)}</section>'
        for title, series, top in charts
    )


def _keys(series: list[Series]) -> str:
    if len(series) == 1:
        return ""
    return "".join(f'<span class="key {one.css}"></span><span class="dim">{one.name}</span>' for one in series)


def _lengths(title: str, lengths: Counter[int], css: str, unit: str) -> str:
    """A histogram over numbers of bits."""
    bits = range(min(lengths, default=0), max(lengths, default=0) + 1)
    labels = [str(1 << one >> 1) for one in bits]
    chart = bar_chart(labels, [lengths[one] for one in bits], css)
    return f'<section class="card"><h2>{title} <span class="dim">{unit} by tokens, from</span></h2>{chart}</section>'


def _endings(statistics: Statistics) -> str:
    reasons = "".join(
        f"<tr><td>{count:,}</td><td>{reason}</td></tr>" for reason, count in _common(statistics.finish_reasons)
    )
    codes = "".join(
        f'<tr><td class="bad">{count:,}</td><td>{code}</td></tr>' for code, count in _common(statistics.error_codes)
    )
    page = (
        f'<section class="card"><h2>How completions ended</h2><table>{reasons or "<tr><td>none</td></tr>"}</table></section>'
    )
    if codes:
        examples = "".join(map(_example, statistics.errors))
        heads = "<tr><th>row</th><th>custom_id</th><th>reason</th></tr>"
        page += f'<section class="card"><h2>Errors</h2><table>{codes}</table><br><table>{heads}{examples}</table></section>'
    return page


def _example(bad: BadRow) -> str:
    custom_id = "" if bad.custom_id is None else html.escape(str(bad.custom_id)[:80])
    message = html.escape(bad.message[:300]).encode("utf-8", "replace").decode()
    custom_id = custom_id.encode("utf-8", "replace").decode()
    return f"<tr><td>{bad.number:,}</td><td>{custom_id}</td><td>{message}</td></tr>"


def _common(counter: Counter[str]) -> list[tuple[str, int]]:
    return [(html.escape(name), count) for name, count in counter.most_common()]


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**7 else f"{number / 1e6:,.1f} M"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds // 60) % 60, int(seconds // 3600)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
