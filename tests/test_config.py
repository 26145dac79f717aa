"""EngineConfig: every setting is checked once, and refused with its name, what was given and the limit."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.config import DTYPES, EngineConfig
from nanovllm.sampling_params import MAX_SEED

INTEGERS = {
    "max_num_batched_tokens": 64,
    "max_num_seqs": 3,
    "max_model_len": 100,
    "tensor_parallel_size": 1,
    "kvcache_block_size": 32,
    "num_kvcache_blocks": 7,
    "seed": 5,
}
NAMES = [field.name for field in dataclasses.fields(EngineConfig)]


def test_everything_has_a_default() -> None:
    config = EngineConfig()
    assert config == EngineConfig.from_kwargs()
    assert (config.max_num_seqs, config.gpu_memory_utilization, config.tensor_parallel_size) == (512, 0.9, 1)
    assert (config.device, config.dtype, config.attention_backend) == ("auto", "auto", "auto")
    assert (config.enforce_eager, config.enable_prefix_caching) == (False, True)
    chosen_later = (
        "max_num_batched_tokens",
        "max_model_len",
        "kvcache_block_size",
        "num_kvcache_blocks",
        "kvcache_memory_gb",
    )
    assert [getattr(config, name) for name in (*chosen_later, "seed")] == [None] * 6


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, 1) for name in INTEGERS if name != "kvcache_block_size"],
        ("kvcache_block_size", 16),
        ("kvcache_block_size", 48),
        ("kvcache_block_size", 256),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("gpu_memory_utilization", 1),
        ("gpu_memory_utilization", 1e-3),
        ("gpu_memory_utilization", np.float32(0.5)),
        ("kvcache_memory_gb", 0.01),
        ("kvcache_memory_gb", 100),
        ("enforce_eager", True),
        ("batch_invariant", True),
        ("enable_prefix_caching", False),
        ("dtype", "auto"),
        *[("dtype", dtype) for names in DTYPES.items() for dtype in names],
        ("device", "cpu"),
        ("attention_backend", "torch_reference"),
    ],
)
def test_values_at_the_limits_are_taken(name: str, value: Any) -> None:
    assert getattr(EngineConfig.from_kwargs(**{name: value}), name) == value


@pytest.mark.parametrize("integer", [np.int32, np.int64, np.uint8, np.uint64])
@pytest.mark.parametrize("name", INTEGERS)
def test_numpy_integers_are_taken(name: str, integer: type[np.integer[Any]]) -> None:
    value = getattr(EngineConfig.from_kwargs(**{name: integer(INTEGERS[name])}), name)
    assert value == INTEGERS[name]
    assert type(value) is int  # NumPy's own overflow and wrap in sums and negation, and seed no random generator


@pytest.mark.parametrize("name", [name for name in INTEGERS if name != "seed"])
@pytest.mark.parametrize("value", [0, -1, np.int64(0)])
def test_a_size_below_one_is_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}$"):
        EngineConfig.from_kwargs(**{name: value})


@pytest.mark.parametrize("value", [1.0, "16", True, [16], np.float64(16)])
@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got ") as error:
        EngineConfig.from_kwargs(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("name", ["max_num_seqs", "tensor_parallel_size"])
def test_what_has_no_automatic_choice_may_not_be_none(name: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got None$"):
        EngineConfig.from_kwargs(**{name: None})


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("kvcache_block_size", 8, "a multiple of 16"),
        ("kvcache_block_size", 17, "a multiple of 16"),
        ("kvcache_block_size", 250, "a multiple of 16"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, f"at most {MAX_SEED}"),
        ("gpu_memory_utilization", 0, "above 0 and at most 1"),
        ("gpu_memory_utilization", 0.0, "above 0 and at most 1"),
        ("gpu_memory_utilization", -0.5, "above 0 and at most 1"),
        ("gpu_memory_utilization", 1.01, "above 0 and at most 1"),
        ("gpu_memory_utilization", 90, "above 0 and at most 1"),
        ("gpu_memory_utilization", math.nan, "above 0 and at most 1"),
        ("gpu_memory_utilization", math.inf, "above 0 and at most 1"),
        ("kvcache_memory_gb", 0, "above 0"),
        ("kvcache_memory_gb", -1.5, "above 0"),
        ("kvcache_memory_gb", math.nan, "above 0"),
        ("kvcache_memory_gb", math.inf, "above 0"),
        ("dtype", "int8", "float32, bfloat16, float16"),
        ("dtype", "Float32", "float32, bfloat16, float16"),
        ("dtype", torch.float64, "float32, bfloat16, float16"),
        ("dtype", torch.int8, "float32, bfloat16, float16"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_limit(name: str, value: Any, limit: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*{limit}") as error:
        EngineConfig.from_kwargs(**{name: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("gpu_memory_utilization", "0.9", "a number"),
        ("gpu_memory_utilization", None, "a number"),
        ("gpu_memory_utilization", True, "a number"),
        ("kvcache_memory_gb", "4GB", "a number"),
        ("kvcache_memory_gb", False, "a number"),
        ("enforce_eager", 1, "True or False"),
        ("batch_invariant", 1, "True or False"),
        ("enforce_eager", None, "True or False"),
        ("enforce_eager", "yes", "True or False"),
        ("enable_prefix_caching", 0, "True or False"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be {wanted}, got ") as error:
        EngineConfig.from_kwargs(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("max_num_seq", "max_num_seqs"),
        ("max_model_length", "max_model_len"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("block_size", "kvcache_block_size"),
        ("num_blocks", "num_kvcache_blocks"),
        ("eager", "enforce_eager"),
        ("enable_prefix_cache", "enable_prefix_caching"),
        ("torch_dtype", "dtype"),
        ("Seed", "seed"),
    ],
)
def test_an_unknown_keyword_names_the_nearest(unknown: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"unknown keyword '{unknown}'; did you mean '{nearest}'"):
        EngineConfig.from_kwargs(**{unknown: 1})


@pytest.mark.parametrize("unknown", ["X", "", "quantization"])
def test_even_a_keyword_that_resembles_none_names_one(unknown: str) -> None:
    with pytest.raises(TypeError, match=f"unknown keyword '{unknown}'; did you mean '({'|'.join(NAMES)})'"):
        EngineConfig.from_kwargs(**{unknown: 1})


def test_an_unknown_keyword_is_told_before_a_bad_value() -> None:
    with pytest.raises(TypeError, match="max_num_seq'"):
        EngineConfig.from_kwargs(max_num_seqs=0, max_num_seq=0)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_frozen(name: str) -> None:
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 1)
    assert config == EngineConfig()


def test_configs_share_no_state() -> None:
    first, second = EngineConfig(max_num_seqs=1), EngineConfig(max_num_seqs=2)
    assert (first.max_num_seqs, second.max_num_seqs) == (1, 2)
    assert dataclasses.replace(first, max_model_len=8) == EngineConfig(max_num_seqs=1, max_model_len=8)


def test_settings_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        EngineConfig(16384)  # type: ignore[misc]
