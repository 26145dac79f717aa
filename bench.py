"""Time an engine on a workload of random token ids, every request asked for exactly as many tokens as drawn.

    python bench.py                                        # a workload that fits the machine
    python bench.py --model PATH --num-seqs 96 --input-len 50 256 --output-len 50 256
    python bench.py --shared-prefix 1024 --repeat 3 --json result.json --plot result.png
    python bench.py --shared-prefix 1024 --no-prefix-caching   # what that prefix costs without the cache
    python bench.py --model PATH --engine transformers     # a peer on the same work: in an interpreter that has it
    python bench.py --host-overhead                        # what a decode step costs in Python, without a model
    python bench.py --batch-overhead                       # what a row of `nanovllm batch` costs beside the model
    python bench.py --sampler                              # the sampler alone: 96 rows of 151,936 logits

Engines are compared by the ratio of medians of the same work on the same machine, run in turn.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.engines import ENGINES, Measurement, Workload
from benchmarks.machine import describe_machine, peak_memory_bytes


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
    parser.add_argument("--model", help="default: as example.py chooses; for openvino a converted folder")
    parser.add_argument("--engine", choices=ENGINES, default="nanovllm")
    parser.add_argument("--num-seqs", type=int, default=256 if gpu else 64)
    parser.add_argument("--input-len", type=int, nargs=2, metavar=("MIN", "MAX"), default=(100, 1024) if gpu else (50, 256))
    parser.add_argument("--output-len", type=int, nargs=2, metavar=("MIN", "MAX"), default=(100, 1024) if gpu else (50, 128))
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens that all prompts begin with")
    parser.add_argument("--no-prefix-caching", action="store_true", help="compute every prompt whole")
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


def choose_model(name: str | None) -> str:
    """The model named, or example.py's; without one a peer's interpreter would need this project."""
    if name is not None:
        return name
    import example

    return str(example.choose_model(None))


def measure_part(args: argparse.Namespace) -> object:
    """What was asked for beside a model: printed, and returned for --json."""
    if args.host_overhead and args.tensor_parallel_size > 1:
        from benchmarks.hand_over import print_hand_over

        return print_hand_over(args.tensor_parallel_size, args.num_seqs)
    if args.host_overhead:
        from benchmarks.host_overhead import print_host_overhead

        return print_host_overhead()
    if args.batch_overhead:
        from benchmarks.batch_overhead import print_batch_overhead

        return print_batch_overhead(Path(choose_model(args.model)))
    from benchmarks.sampler import time_sampler

    result = {**describe_machine(), **time_sampler()}
    for name, value in result.items():
        print(f"  {name:24s} {value}")
    return result


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    if args.host_overhead or args.batch_overhead or args.sampler:
        write_json(args.json, measure_part(args))
        return
    workload = Workload(args.num_seqs, tuple(args.input_len), tuple(args.output_len), args.shared_prefix, args.temperature)
    model = choose_model(args.model)
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
