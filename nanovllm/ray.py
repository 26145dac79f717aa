"""Ray Data: one engine an actor, a dataset of prompts in, the same dataset with the generated text out.

    import ray
    from nanovllm import SamplingParams
    from nanovllm.ray import generate

    dataset = generate(ray.data.read_parquet("prompts/"), "Qwen/Qwen3-0.6B", SamplingParams(max_tokens=256), engines=8)
    dataset.write_parquet("answers/")

Reading, writing, moving rows between machines, retries and checkpoints are Ray's. docs/scaling.md says how many engines
to take, and what happens when one of them dies.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.request_feed import Request
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.table_rows import RowReader
from nanovllm.utils.tokenizer import Refusal

try:
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, DataContext, Dataset
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"nanovllm.ray needs Ray Data ({error}): pip install 'nano-vllm[ray]'") from error

logger = logging.getLogger(__name__)

OUTPUT_SCHEMA = pa.schema(
    [
        ("generated_text", pa.string()),
        ("generated_tokens", pa.list_(pa.int64())),
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int64()),
        ("num_generated_tokens", pa.int64()),
        ("error", pa.string()),
    ]
)


class NanoVLLMStage:
    """One engine, fed with batches of rows: a callable class for `Dataset.map_batches(..., batch_format="pyarrow")`.

    All columns are kept; those of `OUTPUT_SCHEMA` are added. A row that cannot be run has null in all of them but `error`,
    which says why. What is no row's fault is raised: an engine that fails, a table with neither prompts nor messages.

    Args:
        model: as `LLM`'s; every machine must find it there.
        sampling_params: for all rows.
        **options: see `RowReader` (what a row may hold, `seed`, names of columns, `chat_template_args`) and `EngineConfig`.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    def __init__(self, model: str | os.PathLike[str], sampling_params: SamplingParams | None = None, **options: Any) -> None:
        self._reader, engine_options = _split_options(sampling_params, options)
        _use_assigned_cpus()
        self._llm = LLM(model, **engine_options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Complete a batch of rows.

        Raises:
            TypeError: the batch is no pyarrow table.
            ValueError: it has neither prompts nor messages, or has a column that would be added.
        """
        if not isinstance(batch, pa.Table):
            raise TypeError(f"a batch must be a pyarrow table, got {type(batch).__name__}: pass batch_format='pyarrow'")
        taken = [name for name in OUTPUT_SCHEMA.names if name in batch.column_names]
        if taken:
            raise ValueError(f"rows have a column {taken[0]!r} already, which is to be added: rename or drop it")
        rows = batch.select(self._reader.needed_columns(batch.column_names)).to_pylist()
        added = pa.Table.from_pylist(self._complete(rows), schema=OUTPUT_SCHEMA)
        for field, column in zip(OUTPUT_SCHEMA, added.columns, strict=True):
            batch = batch.append_column(field, column)
        return batch

    def _complete(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The columns to add to each row."""
        results: dict[int, dict[str, Any]] = {}
        started: list[int] = []  # rows, in the order of the requests

        def requests() -> Iterator[Request]:
            for index, row in enumerate(rows):
                try:
                    request = self._reader.make_request(row)
                except (TypeError, ValueError) as error:
                    results[index] = _output_columns(error)
                else:
                    started.append(index)
                    yield request

        for number, output in self._llm.generate_as_completed(requests()):
            results[started[number]] = _output_columns(output)
        return [results[index] for index in range(len(rows))]


def generate(
    dataset: Dataset,
    model: str | os.PathLike[str],
    sampling_params: SamplingParams | None = None,
    *,
    engines: int | tuple[int, int] = 1,
    gpus_per_engine: float | None = None,
    cpus_per_engine: float | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> Dataset:
    """Put a `NanoVLLMStage` behind a dataset, an actor an engine. Like every stage of Ray Data it runs when it is consumed.

    Args:
        dataset: of prompts or messages.
        engines: how many; or the fewest and the most, for Ray to choose by the load.
        gpus_per_engine: default `tensor_parallel_size` if the cluster has GPUs and `device` is not "cpu", else 0. Half a
            GPU (0.5, with `gpu_memory_utilization` below 0.5) puts two engines on one.
        cpus_per_engine: default 1. An engine without a GPU computes with a thread for each.
        batch_size: rows handed to an engine at a time, and repeated if it dies. The engine is not full while the last of
            them finish, so take many times `max_num_seqs`, but few enough that every engine gets several batches.
            Default: 8 `max_num_seqs`.
        model, sampling_params, **options: see `NanoVLLMStage`.

    Returns:
        The dataset with the columns of `OUTPUT_SCHEMA` added.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """
    _, engine_options = _split_options(sampling_params, options)
    config = EngineConfig.from_kwargs(**engine_options)  # a mistake is found here, not in an actor
    resources = ray.cluster_resources()
    if gpus_per_engine is None:
        gpus_per_engine = config.tensor_parallel_size if config.device != "cpu" and resources.get("GPU") else 0
    fewest, most = engines if isinstance(engines, tuple) else (engines, engines)
    _warn_if_no_cpus_are_left(fewest * (1 if cpus_per_engine is None else cpus_per_engine), resources.get("CPU", 0))
    if batch_size is None:
        batch_size = 8 * config.max_num_seqs
    device = ("cuda" if gpus_per_engine else "cpu") if config.device == "auto" else config.device
    blocks = dataset.repartition(target_num_rows_per_block=batch_size)  # else all rows of a file go to one engine
    return blocks.map_batches(
        NanoVLLMStage,
        fn_constructor_args=(model, sampling_params),
        fn_constructor_kwargs={**options, "device": device},
        compute=ActorPoolStrategy(min_size=fewest, max_size=most),
        num_gpus=gpus_per_engine,
        num_cpus=cpus_per_engine,
        batch_size=batch_size,
        batch_format="pyarrow",
        udf_modifying_row_count=False,
    )


def _split_options(sampling_params: SamplingParams | None, options: dict[str, Any]) -> tuple[RowReader, dict[str, Any]]:
    """The reader of rows, and the engine's options."""
    known = {field.name for field in fields(RowReader)}
    of_rows = {name: value for name, value in options.items() if name in known}
    if sampling_params is not None:
        of_rows["sampling_params"] = sampling_params
    return RowReader(**of_rows), {name: value for name, value in options.items() if name not in known}


def _warn_if_no_cpus_are_left(taken: float, available: float) -> None:
    """Ray Data waits without a word while its tasks that read and write, and the actor of a checkpoint, find no CPU."""
    needed = 1 if DataContext.get_current().checkpoint_config is None else 2
    if available - taken < needed:
        logger.warning(
            "the engines take %g of the cluster's %g CPUs: Ray's own work needs %d and waits until there are: take fewer "
            "engines, or give them less than a CPU each",
            taken,
            available,
            needed,
        )


def _use_assigned_cpus() -> None:
    """In an actor: as many threads as it asked for CPUs, whatever OMP_NUM_THREADS says."""
    if ray.is_initialized() and (context := ray.get_runtime_context()).get_actor_id() is not None:
        torch.set_num_threads(max(1, int(context.get_assigned_resources().get("CPU", 0))))


def _output_columns(output: RequestOutput | Refusal) -> dict[str, Any]:
    """A row's values for `OUTPUT_SCHEMA`; those that are not named are null."""
    if isinstance(output, Refusal):
        return {"error": str(output)}
    return {
        "generated_text": output["text"],
        "generated_tokens": output["token_ids"],
        "finish_reason": output["finish_reason"],
        "num_prompt_tokens": output["num_prompt_tokens"],
        "num_generated_tokens": len(output["token_ids"]),
    }
