"""The engines that bench.py compares, and the work they are given. Each is imported when it runs: a peer's interpreter need
not have the others.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import torch


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


def has_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has instructions for bfloat16 products, as Linux tells; elsewhere it is taken for one that has."""
    return not cpuinfo.exists() or "bf16" in cpuinfo.read_text()


def common_options(args: argparse.Namespace) -> dict[str, Any]:
    """What nanovllm and vLLM call by the same names."""
    return {
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "enforce_eager": args.enforce_eager,
        "enable_prefix_caching": not args.no_prefix_caching,
    }


def run_nanovllm(model: str, workload: Workload, args: argparse.Namespace) -> Callable[[], Measurement]:
    """Load once; each call of what is returned times the workload."""
    from nanovllm import LLM, SamplingParams

    start = time.perf_counter()
    llm = LLM(model, **common_options(args), tensor_parallel_size=args.tensor_parallel_size)
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
    llm = VLLM(model, **common_options(args))
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


def run_openvino(model: str, workload: Workload, args: argparse.Namespace) -> Callable[[], Measurement]:
    """OpenVINO GenAI on a model that was converted for it (`optimum-cli export openvino`)."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    start = time.perf_counter()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 6, args.max_num_seqs, 2048
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = not args.no_prefix_caching
    precision = "bf16" if has_bfloat16() else "f32"
    options = {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision}
    pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", options, {})
    ids = count()

    def generate(prompts: list[list[int]], lengths: list[int], temperature: float) -> None:
        handles = []  # a request lives as long as its handle
        for prompt, length in zip(prompts, lengths, strict=True):
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = length
            config.ignore_eos = True
            if temperature > 0:  # among all tokens it samples far more slowly than it computes
                config.do_sample, config.temperature, config.top_k = True, temperature, 50
            handles.append(pipeline.add_request(next(ids), openvino.Tensor(np.array([prompt], dtype=np.int64)), config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        assert [len(handle.read_all()[0].generated_ids) for handle in handles] == lengths

    generate([[1, 2, 3]], [8], 0.0)
    load_s = time.perf_counter() - start

    def measure() -> Measurement:
        prompts, lengths = workload.draw()
        start = time.perf_counter()
        generate(prompts, lengths, workload.temperature)
        return Measurement(load_s, time.perf_counter() - start)

    return measure


def run_transformers(model: str, workload: Workload, args: argparse.Namespace) -> Callable[[], Measurement]:
    """Transformers' generate on one left-padded batch, without a prefix cache; it runs until the longest output is there."""
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = AutoModelForCausalLM.from_pretrained(model, torch_dtype="auto" if device == "cuda" or has_bfloat16() else "float32")
    lm = lm.to(device)
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


ENGINES = {"nanovllm": run_nanovllm, "vllm": run_vllm, "openvino": run_openvino, "transformers": run_transformers}
