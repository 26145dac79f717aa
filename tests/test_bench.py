"""bench.py and the engines that it compares."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CheckpointFactory

from benchmarks.engines import ENGINES, Workload
from benchmarks.machine import peak_memory_bytes

ROOT = Path(__file__).parents[1]


def test_a_workload_is_the_same_for_every_engine() -> None:
    workload = Workload(20, (5, 9), (3, 4), shared_prefix=7, temperature=0.6)
    prompts, lengths = workload.draw()
    assert (prompts, lengths) == workload.draw()
    assert len(prompts) == len(lengths) == 20
    assert {len(prompt) - 7 for prompt in prompts} == {5, 6, 7, 8, 9}
    assert set(lengths) == {3, 4}
    assert len({tuple(prompt[:7]) for prompt in prompts}) == 1


def run_bench(model: Path, result: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Three short requests: the results, and what is printed."""
    work = ["--num-seqs", "3", "--input-len", "4", "9", "--output-len", "2", "5", "--max-model-len", "128"]
    command = [sys.executable, "bench.py", "--model", str(model), "--json", str(result), *work, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(result.read_text()), done.stdout


@pytest.mark.parametrize("engine", ["nanovllm", "transformers"])
def test_an_engine_gives_its_numbers(checkpoint: CheckpointFactory, tmp_path: Path, engine: str) -> None:
    result, printed = run_bench(checkpoint(vocab_size=10_000), tmp_path / "result.json", "--engine", engine)
    assert (result["engine"], result["workload"]["num_seqs"]) == (engine, 3)
    assert result["total_s"] == pytest.approx(result["output_tokens"] / result["output_tok_s"], abs=0.0006)  # of 3 decimals
    assert engine in printed.splitlines()[-13]


@pytest.mark.parametrize(("switch", "hits"), [([], 2 * 64), (["--no-prefix-caching"], 0)])
def test_the_prefix_cache_can_be_switched_off(
    checkpoint: CheckpointFactory, tmp_path: Path, switch: list[str], hits: int
) -> None:
    result, _ = run_bench(checkpoint(vocab_size=10_000), tmp_path / "result.json", "--shared-prefix", "64", *switch)
    assert result["prefix_hit_tokens"] == hits


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="other systems do not tell of other processes")
def test_the_memory_of_processes_that_it_started_counts() -> None:
    taken = 2**27  # bytes, by a process that another one started
    grandchild = f"held = b'x' * {taken}; print('ready', flush=True); input()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    before = peak_memory_bytes()
    with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert peak_memory_bytes() >= before + taken
        process.communicate(b"\n")


@pytest.mark.parametrize("engine", sorted(ENGINES.keys() - {"nanovllm"}))
def test_a_peer_needs_nothing_of_this_project(tmp_path: Path, engine: str) -> None:
    (tmp_path / "nanovllm.py").write_text("raise ImportError('nanovllm is not here')")
    names = ["vllm", "transformers", "openvino", "openvino_genai"]
    for name in names:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('reached {name}')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv[0] = 'bench.py'; import bench; bench.main()"
    command = [sys.executable, "-c", code, "--model", "some-folder", "--engine", engine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"reached {engine}" in done.stderr, done.stderr
