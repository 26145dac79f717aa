"""Time an engine on a workload of random token ids, every request asked for exactly as many tokens as drawn.

    python bench.py                                        # a workload that fits the machine
    python bench.py --model PATH --num-seqs 96 --input-len 50 256 --output-len 50 256
    python bench.py --shared-prefix 1024 --repeat 3 --json result.json --plot result.png
    python bench.py --engine transformers                  # a peer on the same work; it must be installed here
    python bench.py --host-overhead                        # what a decode step costs in Python, without a model
    python bench.py --batch-overhead                       # what a row of `nanovllm batch` costs beside the model
    python bench.py --sampler                              # the sampler alone: 96 rows of 151,936 logits

Engines are compared by the ratio of medians of the same work on the same machine, run in turn.
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.batch_overhead import print_batch_overhead
from benchmarks.hand_over import print_hand_over
from benchmarks.host_overhead import print_host_overhead
from example import choose_model
from nanovllm import LLM, SamplingParams
from nanovllm.layers.cpu_layers import fuse_layers
from nanovllm.layers.sampler import Filters, Sampler
from nanovllm.utils.cpu_build import BuildError, load_kernels
from nanovllm.utils.device import choose_device, choose_dtype


@dataclass(frozen=True)
class Workload:
    """The work that every engine is given."""

    num_seqs: int
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    shared_prefix: int
    temperature: float
    seed: int = 0
    vocab: int = 10_000

    def draw(self) -> tuple[list[list[int]], list[int]]:
        """Prompts as token ids, and the number of output tokens of each."""
        rng = Random(self.seed)

        def tokens(n: int) -> list[int]:
            return [rng.randrange(self.vocab) for _ in range(n)]

        prefix = tokens(self.shared_prefix)
        prompts = [prefix + tokens(rng.randint(*self.input_len)) for _ in range(self.num_seqs)]
        return prompts, [rng.randint(*self.output_len) for _ in range(self.num_seqs)]


@dataclass
class Measurement:
    """One run. Times in seconds; those that an engine does not tell are None."""

    load_s: float
    total_s: float
    first_token_s: float | None = None  # until the first request has its first token
    prefill_s: float | None = None  # steps that hold prefill tokens; decodes may ride along
    decode_s: float | None = None  # steps that only decode
    decoded_in_decode: int = 0  # tokens of those
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    timeline: list[tuple[float, int, int, float]] = field(default_factory=list)  # end, tokens, batch size, KV use


def run_nanovllm(model: str, workload: Workload, args: argparse.Namespace) -> Callable[[], Measurement]:
    """Load once; each call of what is returned times the workload."""
    start = time.perf_counter()
    llm = LLM(
        model,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        enforce_eager=args.enforce_eager,
        tensor_parallel_size=args.tensor_parallel_size,
    )
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    load_s = time.perf_counter() - start

    def measure() -> Measurement:
        prompts, lengths = workload.draw()
        manager, preempted = llm.scheduler.block_manager, llm.scheduler.num_preemptions
        manager.reset()  # no hits from the run before
        for prompt, length in zip(prompts, lengths, strict=True):
            params = SamplingParams(temperature=workload.temperature, ignore_eos=True, max_tokens=length)
            llm.add_request(prompt, params)
        sequences = list(llm.scheduler.waiting)
        result = Measurement(load_s, total_s=0.0, prefill_s=0.0, decode_s=0.0)
        start = last = time.perf_counter()
        while not llm.is_finished():
            _, num_tokens = llm.step()
            now = time.perf_counter()
            if num_tokens > 0:
                result.prefill_s += now - last
            else:
                result.decode_s += now - last
                result.decoded_in_decode -= num_tokens
            if result.first_token_s is None and any(len(s) > s.num_prompt_tokens for s in sequences):
                result.first_token_s = now - start
            used = 1 - manager.num_free_blocks / manager.num_blocks
            result.timeline.append((now - start, abs(num_tokens), len(llm.scheduler.running), used))
            last = now
        result.total_s = last - start
        result.prefix_hit_tokens = sum(s.num_cached_tokens or 0 for s in sequences)
        result.preemptions = llm.scheduler.num_preemptions - preempted
        return result

    return measure


def run_vllm(model: str, workload: Workload, args: argparse.Namespace) -> Callable[[], Measurement]:
    """vLLM, from the interpreter that runs this script."""
    from vllm import LLM as VLLM
    from vllm import SamplingParams as VParams

    start = time.perf_counter()
    llm = VLLM(model, max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs, enforce_eager=args.enforce_eager)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], VParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
    load_s = time.perf_counter() - start

    def measure() -> Measurement:
        prompts, lengths = workload.draw()
        llm.reset_prefix_cache()
        params = [
            VParams(temperature=workload.temperature, ignore_eos=True, max_tokens=n, detokenize=False) for n in lengths
        ]
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return Measurement(load_s, time.perf_counter() - start)

    return measure


def run_transformers(model: str, workload: Workload, args: argparse.Namespace) -> Callable[[], Measurement]:
    """Transformers' generate on one left-padded batch; it runs until the longest output is there."""
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    device = choose_device("auto")
    lm = AutoModelForCausalLM.from_pretrained(model, torch_dtype="auto")
    lm = lm.to(device, choose_dtype("auto", lm.dtype, device))  # as ours: a CPU may have no bf16 instructions
    load_s = time.perf_counter() - start

    def measure() -> Measurement:
        prompts, lengths = workload.draw()
        width, longest = max(map(len, prompts)), max(lengths)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        sampling: dict[str, Any] = {"do_sample": False}
        if workload.temperature > 0:
            sampling = {"do_sample": True, "temperature": workload.temperature, "top_k": 0}
        start = time.perf_counter()
        lm.generate(ids, attention_mask=mask, max_new_tokens=longest, min_new_tokens=longest, pad_token_id=0, **sampling)
        return Measurement(load_s, time.perf_counter() - start)

    return measure


ENGINES = {"nanovllm": run_nanovllm, "vllm": run_vllm, "transformers": run_transformers}


def time_sampler(num_rows: int = 96, vocab_size: int = 151_936, repeat: int = 7) -> dict[str, float]:
    """Milliseconds for one token of each row, the best of some, by sampling settings."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = 3 * torch.randn(num_rows, vocab_size, device=device)
    logits[:, ::5000] += 15  # as peaked as a model's often are
    uniforms = torch.rand(num_rows)
    sampler = Sampler()
    if device == "cpu":
        with suppress(BuildError):  # as in the engine: without a compiler the plain one runs
            fuse_layers(sampler, load_kernels())

    def measure(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> float:
        columns = (torch.full((num_rows,), value) for value in (top_k, top_p, min_p))
        filters = None if (top_k, top_p, min_p) == (0, 1.0, 0.0) else Filters(*columns)
        seconds = []
        for _ in range(repeat + 1):
            start = time.perf_counter()
            sampler(logits, torch.full((num_rows,), temperature), uniforms, filters)
            seconds.append(time.perf_counter() - start)
        return round(1e3 * min(seconds[1:]), 1)

    return {
        "greedy_ms": measure(0.0),
        "temperature_ms": measure(0.7),
        "top_k_50_top_p_0.95_ms": measure(0.7, top_k=50, top_p=0.95),
        "top_p_0.95_ms": measure(0.7, top_p=0.95),
        "min_p_0.05_ms": measure(0.7, min_p=0.05),
    }


def summarize(workload: Workload, runs: list[Measurement]) -> dict[str, float | None]:
    """Medians over the runs."""
    prompts, lengths = workload.draw()
    num_in, num_out = sum(map(len, prompts)), sum(lengths)

    def median(values: list[float | None]) -> float | None:
        return None if None in values else round(statistics.median(v for v in values if v is not None), 3)

    def speed(tokens: int, seconds: float | None) -> float | None:
        return tokens / seconds if seconds else None

    return {
        "input_tokens": num_in,
        "output_tokens": num_out,
        "total_s": median([r.total_s for r in runs]),
        "output_tok_s": median([num_out / r.total_s for r in runs]),
        "total_tok_s": median([(num_in + num_out) / r.total_s for r in runs]),
        "prefill_tok_s": median([speed(num_in - r.prefix_hit_tokens, r.prefill_s) for r in runs]),
        "decode_tok_s": median([speed(r.decoded_in_decode, r.decode_s) for r in runs]),
        "time_to_first_token_s": median([r.first_token_s for r in runs]),
        "load_s": median([r.load_s for r in runs]),
        "peak_memory_gib": round(peak_memory_bytes() / 2**30, 2),
        "prefix_hit_tokens": runs[-1].prefix_hit_tokens,
        "preemptions": runs[-1].preemptions,
    }


def peak_memory_bytes() -> int:
    """Of the GPU when there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_machine() -> dict[str, str | int]:
    """What a number is worth nothing without."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    machine: dict[str, str | int] = {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    return machine | installed_versions("nano-vllm", "torch", "transformers", "triton", "flash-attn", "vllm")


def installed_versions(*names: str) -> dict[str, str]:
    """Of those packages that are here."""
    found = {dist.name: dist.version for dist in distributions()}
    return {name: found[name] for name in names if name in found}


def plot(path: str, run: Measurement, title: str) -> None:
    """Throughput over time, and beneath it batch size and use of the KV cache."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ends, tokens, batch, used = zip(*run.timeline, strict=True)
    starts = (0.0, *ends[:-1])
    speeds = [n / (end - start) for n, start, end in zip(tokens, starts, ends, strict=True)]
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 6))
    top.step(ends, speeds, where="pre")
    top.set(ylabel="tokens a second", yscale="log", title=title)
    bottom.step(ends, batch, where="pre", label="running sequences")
    bottom.set(xlabel="seconds", ylabel="running sequences")
    right = bottom.twinx()
    right.step(ends, [100 * u for u in used], where="pre", color="tab:orange")
    right.set(ylabel="KV cache in use, %", ylim=(0, 100))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    """nano-vLLM's own benchmark where there is a GPU, a workload of a minute or so where there is none."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: as example.py chooses")
    parser.add_argument("--engine", choices=ENGINES, default="nanovllm")
    parser.add_argument("--num-seqs", type=int, default=256 if gpu else 64)
    parser.add_argument("--input-len", type=int, nargs=2, metavar=("MIN", "MAX"), default=(100, 1024) if gpu else (50, 256))
    parser.add_argument("--output-len", type=int, nargs=2, metavar=("MIN", "MAX"), default=(100, 1024) if gpu else (50, 128))
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int, default=512, help="that run at the same time")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="RANKS")
    parser.add_argument("--host-overhead", action="store_true", help="no model: what a step costs beside it")
    parser.add_argument("--batch-overhead", action="store_true", help="no model: what a row of `nanovllm batch` costs")
    parser.add_argument("--sampler", action="store_true", help="time the sampler alone, without a model")
    parser.add_argument("--repeat", type=int, default=1, help="runs; the table shows medians")
    parser.add_argument("--json", metavar="FILE", help="write results, hardware, versions and workload")
    parser.add_argument("--plot", metavar="FILE.png", help="draw throughput over time (needs matplotlib)")
    args = parser.parse_args()
    if args.plot and args.engine != "nanovllm":
        parser.error("--plot needs --engine nanovllm: the peers do not tell their steps")
    return args


def write_json(path: str | None, content: object) -> None:
    """Where it was asked for."""
    if path:
        with open(path, "w") as file:
            json.dump(content, file, indent=2)


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    if args.host_overhead:
        if args.tensor_parallel_size > 1:
            write_json(args.json, print_hand_over(args.tensor_parallel_size, args.num_seqs))
        else:
            write_json(args.json, print_host_overhead())
        return
    if args.batch_overhead:
        write_json(args.json, print_batch_overhead(Path(choose_model(args.model))))
        return
    if args.sampler:
        print(describe_machine())
        for name, milliseconds in time_sampler().items():
            print(f"  {name:24s} {milliseconds}")
        return
    workload = Workload(args.num_seqs, tuple(args.input_len), tuple(args.output_len), args.shared_prefix, args.temperature)
    model = str(choose_model(args.model))
    measure = ENGINES[args.engine](model, workload, args)
    runs = [measure() for _ in range(args.repeat)]
    summary, machine = summarize(workload, runs), describe_machine()
    print(f"{args.engine}, {model}, {machine['hardware']}")
    for name, value in summary.items():
        print(f"  {name:24s} {'-' if value is None else value}")
    record = {"engine": args.engine, "model": model, "machine": machine, "workload": asdict(workload), **summary}
    write_json(args.json, record)
    if args.plot:
        plot(args.plot, runs[-1], f"{args.engine}, {args.num_seqs} requests, {machine['hardware']}")


if __name__ == "__main__":
    main()
