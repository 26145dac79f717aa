"""Ray Data: one engine an actor, a dataset of prompts in, the same dataset with the generated text out.

    import ray
    from nanovllm import SamplingParams
    from nanovllm.ray import generate

    dataset = generate(ray.data.read_parquet("prompts/"), "Qwen/Qwen3-0.6B", SamplingParams(max_tokens=256), engines=8)
    dataset.write_parquet("answers/")

Reading, writing, moving rows between machines, retries and checkpoints are Ray's. docs/scaling.md says how many engines
to take, and what happens when one of them dies.
"""

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.request_feed import Request
from nanovllm.llm import LLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import MAX_SEED, SamplingParams, check_int
from nanovllm.utils.tokenizer import Refusal

try:
    import pyarrow as pa
    import ray
    from ray.data import ActorPoolStrategy, Dataset
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

    A row has a prompt (a string or token ids) or messages (a list of structs with role and content, for the checkpoint's
    chat template); the other of the two is null, or its column is not there. It may have sampling parameters of its own, a
    struct whose fields that are not null replace those of `sampling_params`.

    All columns are kept; those of `OUTPUT_SCHEMA` are added. A row that cannot be run has null in all of them but `error`,
    which says why. What is no row's fault is raised: an engine that fails, a batch with neither of the columns.

    Args:
        model: as `LLM`'s; every machine must find it there.
        sampling_params: for all rows. One completion a row: to have several, repeat the row.
        seed: makes what is sampled a function of this seed and the row's own values (all columns), so that a retry, or
            another number of engines, gives the same text; equal rows get equal texts. None: every run draws anew.
        prompt_column, messages_column, sampling_params_column: their names.
        chat_template_args: passed on to the chat template, such as {"enable_thinking": False}.
        **engine_options: see `nanovllm.config.EngineConfig`.

    Raises:
        TypeError, ValueError: a value that cannot be.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        sampling_params: SamplingParams | None = None,
        *,
        seed: int | None = None,
        prompt_column: str = "prompt",
        messages_column: str = "messages",
        sampling_params_column: str = "sampling_params",
        chat_template_args: Mapping[str, Any] | None = None,
        **engine_options: Any,
    ) -> None:
        self._sampling_params = _check_sampling_params(sampling_params)
        self._seed = None if seed is None else check_int("seed", seed, minimum=0, maximum=MAX_SEED)
        self._prompt_column = prompt_column
        self._messages_column = messages_column
        self._sampling_params_column = sampling_params_column
        self._chat_template_args = dict(chat_template_args or {})
        _use_assigned_cpus()
        self._llm = LLM(model, **engine_options)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Complete a batch of rows.

        Raises:
            TypeError: the batch is no pyarrow table.
            ValueError: it has neither prompts nor messages, or has a column that would be added.
        """
        self._check_columns(batch)
        results: dict[int, dict[str, Any]] = {}
        started: list[int] = []  # rows, in the order of the requests

        def requests() -> Iterator[Request]:
            for index, row in enumerate(self._read_rows(batch)):
                try:
                    request = self._make_request(row)
                except (TypeError, ValueError) as error:
                    results[index] = {"error": str(error)}
                else:
                    started.append(index)
                    yield request

        for number, output in self._llm.generate_as_completed(requests()):
            results[started[number]] = _output_columns(output)
        added = pa.Table.from_pylist([results[index] for index in range(batch.num_rows)], schema=OUTPUT_SCHEMA)
        for field, column in zip(OUTPUT_SCHEMA, added.columns, strict=True):
            batch = batch.append_column(field, column)
        return batch

    def _check_columns(self, batch: pa.Table) -> None:
        if not isinstance(batch, pa.Table):
            raise TypeError(f"a batch must be a pyarrow table, got {type(batch).__name__}: pass batch_format='pyarrow'")
        names = batch.column_names
        if self._prompt_column not in names and self._messages_column not in names:
            raise ValueError(f"rows have no column {self._prompt_column!r} or {self._messages_column!r}, but {names}")
        taken = sorted({*names} & {*OUTPUT_SCHEMA.names})
        if taken:
            raise ValueError(f"rows have a column {taken[0]!r} already, which is to be added: rename or drop it")

    def _read_rows(self, batch: pa.Table) -> list[dict[str, Any]]:
        """The rows as Python's objects, without nulls; of all columns if seeds are made of them."""
        needed = (self._prompt_column, self._messages_column, self._sampling_params_column)
        names = [name for name in batch.column_names if self._seed is not None or name in needed]
        return [_without_nulls(row) for row in batch.select(names).to_pylist()]

    def _make_request(self, row: dict[str, Any]) -> Request:
        """What the engine is asked for.

        Raises:
            TypeError, ValueError: a row that cannot be run; what depends on the model is checked by the engine.
        """
        prompt: Any = row.get(self._prompt_column)
        messages: Any = row.get(self._messages_column)
        if (prompt is None) == (messages is None):
            found = "neither" if prompt is None else "both"
            raise ValueError(f"a row needs {self._prompt_column!r} or {self._messages_column!r}, this one has {found}")
        if messages is not None and not (isinstance(messages, list) and all(isinstance(one, dict) for one in messages)):
            raise TypeError(f"{self._messages_column!r} must be a list of messages, structs of role and content")
        params = self._sampling_params_of(row)
        if params.seed is None and self._seed is not None:
            params = replace(params, seed=_row_seed(self._seed, row))
        return Request(prompt if messages is None else messages, params, self._chat_template_args, name="the prompt")

    def _sampling_params_of(self, row: dict[str, Any]) -> SamplingParams:
        options = row.get(self._sampling_params_column)
        if options is None:
            return self._sampling_params
        if not isinstance(options, dict):
            raise TypeError(f"{self._sampling_params_column!r} must be a struct, got {type(options).__name__}")
        biases = options.get("logit_bias")
        if isinstance(biases, dict):  # the names of a struct's fields are strings
            options = {**options, "logit_bias": {int(token): bias for token, bias in biases.items()}}
        return _check_sampling_params(replace(self._sampling_params, **options))


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
    stage_options = inspect.signature(NanoVLLMStage).parameters
    config = EngineConfig.from_kwargs(**{name: value for name, value in options.items() if name not in stage_options})
    _check_sampling_params(sampling_params)
    resources = ray.cluster_resources()
    if gpus_per_engine is None:
        gpus_per_engine = config.tensor_parallel_size if config.device != "cpu" and resources.get("GPU") else 0
    fewest, most = engines if isinstance(engines, tuple) else (engines, engines)
    num_cpus = fewest * (1 if cpus_per_engine is None else cpus_per_engine)
    if num_cpus >= resources.get("CPU", 0):
        logger.warning(
            "the engines take %g CPUs, the cluster has %g: tasks that read and write need one, and wait until there is",
            num_cpus,
            resources.get("CPU", 0),
        )
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


def _check_sampling_params(params: SamplingParams | None) -> SamplingParams:
    """`params` or the defaults; raise if they ask for what has no column."""
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise TypeError(f"sampling_params must be SamplingParams, got {type(params).__name__}")
    for name, only in (("n", 1), ("logprobs", None), ("prompt_logprobs", None)):
        value = getattr(params, name)
        if value != only:
            raise ValueError(f"{name} must be {only} here, got {value}: there is no column for it")
    return params


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


def _without_nulls(value: Any) -> Any:
    """The same without the fields of structs that are null: what a row did not say, but another of its batch did."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _row_seed(seed: int, row: dict[str, Any]) -> int:
    """A function of the seed and the row's values."""
    content = json.dumps([seed, row], sort_keys=True, default=repr)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big") & MAX_SEED
