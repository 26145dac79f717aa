"""What a decode step costs on the host: schedule, build the inputs, take in the tokens. No model, no GPU.

On a fast GPU this is what one waits for between two steps. Sequences decode in blocks of 256 tokens, contexts drawn between
100 and 1,024 tokens, so that at any step some of them get a new block and some fill one.
"""

import gc
import time
from random import Random

import numpy as np
import torch

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.input_batch import InputBatch
from nanovllm.engine.input_buffer import InputBuffer
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import StepShape

BLOCK_SIZE, MAX_MODEL_LEN, MAX_NUM_BATCHED_TOKENS = 256, 4096, 16384
NUM_STEPS, NUM_ROUNDS = 100, 6  # the first round is to warm up
RUNNING = (32, 256, 512)


def measure_host_overhead(running: int) -> dict[str, float]:
    """Microseconds a decode step of `running` sequences, by part: the medians of the quietest round."""
    max_blocks = MAX_MODEL_LEN // BLOCK_SIZE
    scheduler = Scheduler(
        BlockManager(running * max_blocks, BLOCK_SIZE), running, MAX_NUM_BATCHED_TOKENS, (151_643, 151_645)
    )
    input_batch = InputBatch(running, MAX_MODEL_LEN, BLOCK_SIZE)
    shape = StepShape(running, running, max_blocks, 1, MAX_MODEL_LEN)  # of a captured decode
    memory = torch.zeros(InputBuffer.num_bytes(MAX_NUM_BATCHED_TOKENS, running, max_blocks), dtype=torch.uint8)
    input_buffer = InputBuffer(memory, memory)
    rng = Random(0)
    params = SamplingParams(temperature=0.6, max_tokens=MAX_MODEL_LEN)
    for seq_id in range(running):
        prompt = [rng.randrange(10_000) for _ in range(rng.randint(100, 1024))]
        scheduler.add(Sequence(seq_id, prompt, params, seed=seq_id, max_total_tokens=MAX_MODEL_LEN))
    token_ids = np.random.default_rng(0).integers(10_000, size=running)

    times: list[tuple[float, float, float]] = []
    gc.collect()
    while len(times) < NUM_STEPS * NUM_ROUNDS:
        start = time.perf_counter()
        batch = scheduler.schedule()
        scheduled = time.perf_counter()
        inputs = input_batch.apply(batch)
        if inputs.max_seqlen_q == 1:
            input_buffer.upload(inputs, shape)
        input_batch.sampling_inputs()
        sampled = token_ids[: len(inputs.sampled_rows)]
        input_batch.append(sampled)
        built = time.perf_counter()
        scheduler.update(batch, sampled)
        updated = time.perf_counter()
        if batch.num_prefill_tokens == 0:
            times.append((scheduled - start, built - scheduled, updated - built))
    rounds = np.array(times).reshape(NUM_ROUNDS, NUM_STEPS, 3)[1:] * 1e6
    quietest = rounds[np.median(rounds.sum(axis=2), axis=1).argmin()]  # the machine may be shared
    schedule_us, inputs_us, update_us = np.median(quietest, axis=0).round(1).tolist()
    return {
        "running": running,
        "schedule_us": schedule_us,
        "inputs_us": inputs_us,
        "update_us": update_us,
        "total_us": round(float(np.median(quietest.sum(axis=1))), 1),
    }


def print_host_overhead() -> list[dict[str, float]]:
    """Measure for each number of running sequences, and print a table."""
    results = [measure_host_overhead(running) for running in RUNNING]
    print("microseconds a decode step, on the host")
    print("".join(f"{name.removesuffix('_us'):>10}" for name in results[0]))
    for result in results:
        print("".join(f"{value:>10g}" for value in result.values()))
    return results
