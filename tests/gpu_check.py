"""What only a GPU can prove: run by `make gpu-check`, on one machine, with one model folder, offline.

    python tests/gpu_check.py [--model FOLDER] [--json FILE] [--skip-bench]

Kernels against plain PyTorch on random batches, CUDA graphs against eager steps, attention backends against each other,
log-probabilities against Transformers', and bench.py's default workload. Prints a table, writes JSON, fails if a check does.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from backend_parity import check_against_plain, random_seqlens

from benchmarks.machine import describe_machine
from example import choose_model
from nanovllm import LLM, SamplingParams
from nanovllm.attention.backend import AttentionSpec
from nanovllm.attention.flash_attn import FlashAttnBackend
from nanovllm.attention.triton import TritonBackend

NO_GPU = "gpu-check needs a GPU that torch can use, and torch.cuda.is_available() is False here: nothing was checked"
DEVICE = "cuda"
# Greedy tokens may differ where the best logits are within rounding of each other, as float32 tells: in 16 bits each of some
# hundred sums is off by 2**-9, together by a few per cent of the largest logit. A wrong kernel is off by its size.
NEAR = 2**-5
HEADS = [(4, 2, 64), (32, 8, 80), (9, 3, 96), (14, 2, 128), (16, 8, 128), (4, 4, 256)]

Result = dict[str, object]


def check_kernels(model: Path) -> Result:
    """Both backends against plain PyTorch: head sizes, ratios of grouped queries, block sizes, dtypes."""
    rng, checked, skipped = random.Random(0), 0, set()
    for backend_class, block_sizes in ((TritonBackend, (16, 48, 256)), (FlashAttnBackend, (256,))):
        for num_heads, num_kv_heads, head_dim in HEADS:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                block_size = rng.choice(block_sizes)
                spec = AttentionSpec(num_heads, num_kv_heads, head_dim, block_size, dtype, torch.device(DEVICE))
                reason = backend_class.why_not(spec)
                if reason is not None:
                    skipped.add(f"{backend_class.__name__}: {reason}")
                    continue
                check_against_plain(backend_class(spec), random_seqlens(rng, longest=3000, num_seqs=9), seed=checked)
                check_against_plain(backend_class(spec), [(rng.randint(1, 5000), 1) for _ in range(33)], seed=checked)
                checked += 1
    return {"passed": checked > 0, "configurations": checked, "left out": sorted(skipped)}


def check_graphs(model: Path) -> Result:
    """Replayed against eager steps: prompts computed beside decodes, and decodes of fewer and fewer sequences."""
    mixed = {"max_num_seqs": 16, "max_num_batched_tokens": 1000}  # chunks beside decodes, then decodes alone
    eager = greedy_tokens(model, 40, enforce_eager=True, **mixed)
    return compare(model, eager, greedy_tokens(model, 40, **mixed))


def check_backends(model: Path) -> Result:
    """The backends that can serve here, against plain PyTorch."""
    expected = greedy_tokens(model, 12, attention_backend="torch_reference")
    results: Result = {"passed": True}
    for name in ("triton", "flash_attn"):
        try:
            result = compare(model, expected, greedy_tokens(model, 12, attention_backend=name))
        except ValueError as error:  # it cannot serve this GPU or model, and says why
            results[name] = str(error)
            continue
        results[name] = result
        results["passed"] = bool(results["passed"] and result["passed"])
    return results


def check_transformers(model: Path) -> Result:
    """Greedy tokens of Transformers in the same dtype."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(DEVICE).eval()
    expected = []
    for prompt, length in requests(6, lm.config.vocab_size):
        ids = torch.tensor([prompt], device=DEVICE)
        options = {"do_sample": False, "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}
        expected.append(lm.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    del lm
    torch.cuda.empty_cache()
    return compare(model, expected, greedy_tokens(model, 6))


def run_bench(model: Path) -> Result:
    """bench.py as it is, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "bench.json")
        command = [sys.executable, "bench.py", "--model", str(model), "--json", str(path)]
        done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        if done.returncode:
            return {"passed": False, "error": done.stderr[-2000:]}
        return {"passed": True, **json.loads(path.read_text())}


CHECKS: dict[str, Callable[[Path], Result]] = {
    "kernels": check_kernels,
    "graphs": check_graphs,
    "backends": check_backends,
    "transformers": check_transformers,
    "bench": run_bench,
}


def requests(number: int, vocab_size: int) -> list[tuple[list[int], int]]:
    """Prompts, and output tokens of each."""
    rng = random.Random(0)
    return [(rng.choices(range(vocab_size), k=rng.randint(1, 600)), 24 + index) for index in range(number)]


def greedy_tokens(model: Path, number: int, **options: object) -> list[list[int]]:
    """Ours."""
    limits = {"max_model_len": 1024, "max_num_seqs": number, "gpu_memory_utilization": 0.6}
    with LLM(model, device=DEVICE, **{**limits, **options}) as llm:
        work = requests(number, llm.vocab_size)
        params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for _, length in work]
        outputs = llm.generate([prompt for prompt, _ in work], params, use_tqdm=False)
    torch.cuda.empty_cache()
    return [output["token_ids"] for output in outputs]


def compare(model: Path, expected: list[list[int]], found: list[list[int]]) -> Result:
    """Tokens of the same `requests`: equal up to the first difference of each, and there nearly as good as the best."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(DEVICE).eval()
    equal, gaps = 0, [0.0]
    prompts = [prompt for prompt, _ in requests(len(expected), lm.config.vocab_size)]
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        assert len(ours) == len(theirs), "of the same requests"
        first = next((index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        equal += len(theirs) if first is None else first
        if first is not None:
            ids = torch.tensor([prompt + theirs[:first]], device=DEVICE)
            with torch.inference_mode():
                logits = lm(ids).logits[0, -1]
            worse = min(logits[ours[first]], logits[theirs[first]])
            gaps.append(float((logits.max() - worse) / logits.abs().max()))
    agreement = equal / sum(map(len, expected))
    differ = {"differ": len(gaps) - 1, "worst_gap": round(max(gaps), 4)}
    return {"passed": max(gaps) <= NEAR, "agreement": round(agreement, 4), **differ}


def run_checks(model: Path, names: list[str]) -> dict[str, Result]:
    """Each check, its time with it; one that raises has failed, and the others still run."""
    results: dict[str, Result] = {}
    for name in names:
        start = time.perf_counter()
        try:
            result = CHECKS[name](model)
        except Exception as error:
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        results[name] = result | {"seconds": round(time.perf_counter() - start, 1)}
        print(f"  {name:14s} {'passed' if result['passed'] else 'FAILED':8s} {results[name]}", flush=True)
    return results


def main() -> None:
    """Check, print, write; the exit status says whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's folder; default: as example.py chooses")
    parser.add_argument("--json", metavar="FILE", default="gpu-check.json")
    parser.add_argument("--skip-bench", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(NO_GPU)
    model = Path(choose_model(args.model))
    machine = describe_machine()
    print(f"gpu-check on {machine['hardware']}, {model}")
    results = run_checks(model, [name for name in CHECKS if not (args.skip_bench and name == "bench")])
    Path(args.json).write_text(json.dumps({"machine": machine, "model": str(model), "checks": results}, indent=2))
    if not all(result["passed"] for result in results.values()):
        sys.exit("gpu-check failed")


if __name__ == "__main__":
    main()
