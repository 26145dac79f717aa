"""Reading config.json: both of Transformers' styles, what is refused, and the longest sequence that follows from it."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import models
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import choose_max_model_len
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models import MODELS, get_model_class, load_model_config
from nanovllm.models.config import ModelConfig, read_model_config

THETA = 500_000.0
MODEL_TYPES = {
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2ForCausalLM": "qwen2",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "sliding_window": None,
}
ROPE_KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def version_4_file(rope: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """The part of a config.json in which the versions differ, as 4.51 writes it."""
    return {"rope_theta": THETA, "rope_scaling": None if rope == {"rope_type": "default"} else rope, "torch_dtype": dtype}


def version_5_file(rope: dict[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """The same as 5.x writes it."""
    return {"rope_parameters": {"rope_theta": THETA, **rope}, "dtype": dtype}


def write_config(folder: Path, architecture: str = "LlamaForCausalLM", **options: Any) -> Path:
    content = {"architectures": [architecture], "model_type": MODEL_TYPES.get(architecture, "gpt2"), **SHAPE, **options}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def version_4_reading_version_4(rope: dict[str, Any], **options: Any) -> SimpleNamespace:
    """The object that Transformers 4.51 makes of a file of its own style."""
    scaling = version_4_file(rope)["rope_scaling"]
    return SimpleNamespace(
        **{**SHAPE, "rope_theta": THETA, "rope_scaling": scaling, "torch_dtype": torch.bfloat16, **options}
    )


def version_4_reading_version_5(rope: dict[str, Any], **options: Any) -> SimpleNamespace:
    """The object that Transformers 4.51 makes of a newer file.

    Keys that it does not know become attributes as they are, and beside them stand its own defaults, all wrong.
    """
    defaults = {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": None}
    return SimpleNamespace(**{**SHAPE, **defaults, **version_5_file(rope), **options})


def rotary_table(config: ModelConfig) -> torch.Tensor:
    return RotaryEmbedding(config.rope, config.head_dim, 256).cos_sin


# ---- both styles ----


@pytest.mark.parametrize("kind", ROPE_KINDS)
@pytest.mark.parametrize("architecture", MODEL_TYPES)
def test_both_styles_read_the_same(architecture: str, kind: str, tmp_path: Path) -> None:
    rope = ROPE_KINDS[kind]
    configs = [
        load_model_config(write_config(tmp_path, architecture, **version_4_file(rope))),
        load_model_config(write_config(tmp_path, architecture, **version_5_file(rope))),
        read_model_config(version_4_reading_version_4(rope), architecture),
        read_model_config(version_4_reading_version_5(rope), architecture),
    ]
    assert configs[1:] == configs[:-1]
    config = configs[0]
    assert (config.rope.kind, config.rope.theta) == (kind, THETA)
    assert config.rope.scaling == {name: value for name, value in rope.items() if name != "rope_type"}
    assert config.dtype == torch.bfloat16


def test_the_rest_of_the_shape_is_read(tmp_path: Path) -> None:
    config = load_model_config(write_config(tmp_path, **version_5_file(ROPE_KINDS["default"])))
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
        rope=config.rope,
        sliding_window=None,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_the_oldest_name_of_the_rope_kind_is_read(key: str, tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    file = load_model_config(write_config(tmp_path, **{"rope_theta": THETA, key: scaling}))
    attributes = read_model_config(SimpleNamespace(**SHAPE, **{"rope_theta": THETA, key: scaling}), "LlamaForCausalLM")
    assert file.rope == attributes.rope
    assert (file.rope.kind, file.rope.factor, file.rope.theta) == ("linear", 2.0, THETA)


def test_yarn_without_the_original_length_stretches_the_promised_one(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0}
    file = load_model_config(write_config(tmp_path, **version_4_file(rope)))
    attributes = read_model_config(version_4_reading_version_4(rope), "LlamaForCausalLM")
    for config in (file, attributes):
        assert config.rope.original_max_positions == 256
        assert config.rope.max_positions == 1024
    assert torch.equal(rotary_table(file), rotary_table(attributes))


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths() -> None:
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}
    implied = read_model_config(version_4_reading_version_4(rope), "LlamaForCausalLM")
    explicit = read_model_config(version_4_reading_version_4({**rope, "factor": 4.0}), "LlamaForCausalLM")
    assert implied.rope.factor == 4.0
    assert torch.equal(rotary_table(implied), rotary_table(explicit))


def test_no_rope_in_the_file_means_the_architectures_default(tmp_path: Path) -> None:
    config = load_model_config(write_config(tmp_path))
    assert (config.rope.kind, config.rope.theta, config.rope.scaling) == ("default", 10000.0, {})


def test_no_dtype_in_the_file_means_float32(tmp_path: Path) -> None:
    assert load_model_config(write_config(tmp_path)).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtypes(key: str, dtype: str, tmp_path: Path) -> None:
    assert load_model_config(write_config(tmp_path, **{key: dtype})).dtype == getattr(torch, dtype)
    for value in (dtype, f"torch.{dtype}", getattr(torch, dtype)):
        config = read_model_config(SimpleNamespace(**SHAPE, rope_theta=THETA, **{key: value}), "LlamaForCausalLM")
        assert config.dtype == getattr(torch, dtype)


# ---- values with a default, biases ----


@pytest.mark.parametrize("head_dim", [{}, {"head_dim": None}])
def test_head_dim_defaults_to_the_hidden_size_over_heads(head_dim: dict[str, None]) -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "head_dim"}
    assert read_model_config(SimpleNamespace(**shape, **head_dim, rope_theta=THETA), "Qwen2ForCausalLM").head_dim == 16


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": None}])
def test_every_head_has_its_own_keys_by_default(options: dict[str, None]) -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
    assert read_model_config(SimpleNamespace(**shape, **options, rope_theta=THETA), "LlamaForCausalLM").num_kv_heads == 4


@pytest.mark.parametrize(
    ("architecture", "options", "biases"),
    [
        ("LlamaForCausalLM", {}, (False, False, False)),
        ("LlamaForCausalLM", {"attention_bias": True}, (True, True, False)),
        ("LlamaForCausalLM", {"mlp_bias": True}, (False, False, True)),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False)),
        ("Qwen3ForCausalLM", {}, (False, False, False)),
        ("Qwen2ForCausalLM", {}, (True, False, False)),  # no option there: queries, keys and values always have one
        ("MistralForCausalLM", {}, (False, False, False)),
    ],
)
def test_biases(architecture: str, options: dict[str, bool], biases: tuple[bool, ...], tmp_path: Path) -> None:
    config = load_model_config(write_config(tmp_path, architecture, **options))
    assert (config.qkv_bias, config.o_bias, config.mlp_bias) == biases


# ---- what is refused, by name ----

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
    "quantised": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantization_config"),
    "partial rotation, in the model": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "partial rotation, in the rope": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": THETA, "partial_rotary_factor": 0.25}},
        "partial_rotary_factor 0.25",
    ),
    "dtype": ({"dtype": "float64"}, "dtype .*float64"),
    "dtype of quantised weights": ({"torch_dtype": "float8_e4m3fn"}, "dtype .*float8_e4m3fn"),
}
REFUSED_ROPE: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0] * 16,
        "long_factor": [2.0] * 16,
        "original_max_position_embeddings": 64,
    },
    "mrope": {"rope_type": "mrope", "mrope_section": [4, 6, 6]},
    "made-up": {"rope_type": "made-up"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_not_implemented_are_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        load_model_config(write_config(tmp_path, **options))
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("kind", REFUSED_ROPE)
def test_rope_kinds_that_are_not_implemented_are_refused(kind: str, tmp_path: Path) -> None:
    rope = REFUSED_ROPE[kind]
    for options in (version_4_file(rope), version_5_file(rope)):
        with pytest.raises(ValueError, match=f"rope_type '{kind}' is not supported"):
            load_model_config(write_config(tmp_path, **options))
    for hf_config in (version_4_reading_version_4(rope), version_4_reading_version_5(rope)):
        with pytest.raises(ValueError, match=f"rope_type '{kind}' is not supported"):
            read_model_config(hf_config, "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("rope", "missing"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, "low_freq_factor"),
        ({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "factor"),
    ],
)
def test_rope_kinds_without_their_options_are_refused(rope: dict[str, Any], missing: str, tmp_path: Path) -> None:
    for options in (version_4_file(rope), version_5_file(rope)):
        with pytest.raises(ValueError, match=missing) as caught:
            load_model_config(write_config(tmp_path, **options))
        assert str(tmp_path / "config.json") in str(caught.value)
    # Transformers' own check may be missing: 4.51 makes none of what it does not know.
    for hf_config in (version_4_reading_version_4(rope), version_4_reading_version_5(rope)):
        with pytest.raises(ValueError, match=missing):
            read_model_config(hf_config, "LlamaForCausalLM")


def test_a_config_without_any_rope_theta_is_refused() -> None:
    # A default here would silently be another model.
    with pytest.raises(ValueError, match="neither rope_theta nor rope_parameters"):
        read_model_config(SimpleNamespace(**SHAPE), "LlamaForCausalLM")


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MadeUpForCausalLM", "Qwen3MoeForCausalLM"])
def test_unsupported_architectures_are_refused(architecture: str, tmp_path: Path) -> None:
    message = f"'{architecture}' is not supported; .*Qwen3ForCausalLM"
    with pytest.raises(ValueError, match=message) as caught:
        load_model_config(write_config(tmp_path, architecture))
    assert str(tmp_path / "config.json") in str(caught.value)
    with pytest.raises(ValueError, match=message):
        get_model_class(architecture)


@pytest.mark.parametrize("architectures", [None, []])
def test_a_config_without_an_architecture_is_refused(architectures: list[str] | None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture 'none' is not supported"):
        load_model_config(write_config(tmp_path, architectures=architectures))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", "\x00\xff"])
def test_files_that_are_no_config_are_refused_by_name(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        load_model_config(tmp_path)
    assert str(path) in str(caught.value)


class ConfigError(Exception):
    """As a version of Transformers may define it."""


@pytest.mark.parametrize("error", [KeyError, ZeroDivisionError, ConfigError])
def test_whatever_transformers_raises_becomes_an_error_that_names_the_file(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error("what is wrong")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", fail)
    with pytest.raises(ValueError, match="what is wrong") as caught:
        load_model_config(write_config(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads 4 .* num_key_value_heads 3"):
        load_model_config(write_config(tmp_path, num_key_value_heads=3))


def test_registry_has_the_supported_architectures() -> None:
    assert set(MODELS) == set(MODEL_TYPES)
    assert all(get_model_class(name) is MODELS[name] for name in MODELS)


# ---- sliding windows ----


def test_sliding_window_is_read(tmp_path: Path) -> None:
    assert load_model_config(write_config(tmp_path, "MistralForCausalLM", sliding_window=64)).sliding_window == 64


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_sliding_window_that_is_turned_off_is_none(architecture: str, tmp_path: Path) -> None:
    off = {"sliding_window": 64, "use_sliding_window": False}
    assert load_model_config(write_config(tmp_path, architecture, **off)).sliding_window is None
    # 4.51's object of such a file keeps the size.
    attributes = version_4_reading_version_4(ROPE_KINDS["default"], **off)
    assert read_model_config(attributes, architecture).sliding_window is None


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_sliding_window_of_some_layers_counts(architecture: str, tmp_path: Path) -> None:
    options = {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}
    assert load_model_config(write_config(tmp_path, architecture, **options)).sliding_window == 64


def test_sliding_window_of_no_layer_is_none() -> None:
    attributes = version_4_reading_version_5(
        ROPE_KINDS["default"], sliding_window=64, use_sliding_window=True, layer_types=["full_attention"] * 3
    )
    assert read_model_config(attributes, "Qwen3ForCausalLM").sliding_window is None


# ---- max_model_len ----


def make_config(kind: str = "default", **options: Any) -> ModelConfig:
    return read_model_config(version_4_reading_version_4(ROPE_KINDS[kind], **options), "MistralForCausalLM")


def choose(max_model_len: int | None, config: ModelConfig) -> int:
    return choose_max_model_len(EngineConfig(max_model_len=max_model_len), config)


@pytest.mark.parametrize(("made_for", "expected"), [(256, 256), (4095, 4095), (4096, 4096), (131072, 4096)])
def test_default_max_model_len_is_4096_or_what_the_model_was_made_for(made_for: int, expected: int) -> None:
    assert choose(None, make_config(max_position_embeddings=made_for)) == expected


@pytest.mark.parametrize("wanted", [1, 100, 256])
def test_max_model_len_is_as_configured(wanted: int, caplog: pytest.LogCaptureFixture) -> None:
    assert choose(wanted, make_config()) == wanted
    assert not caplog.records


def test_max_model_len_beyond_what_the_model_was_made_for_is_reduced_aloud(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose(257, make_config()) == 256
    assert "max_model_len=257 is reduced to 256" in caplog.text


@pytest.mark.parametrize(
    ("kind", "positions", "longest"),
    [
        ("linear", 256, 512),
        ("llama3", 256, 256),  # here the config's positions are those of the stretched model
        ("yarn", 256, 256),  # and here, if they are more than those that were stretched
        ("yarn", 80, 256),
    ],
)
def test_stretched_positions_can_be_used(kind: str, positions: int, longest: int) -> None:
    assert choose(10_000, make_config(kind, max_position_embeddings=positions)) == longest


@pytest.mark.parametrize("wanted", [1, 63, 64])
def test_contexts_within_the_sliding_window_are_accepted(wanted: int) -> None:
    assert choose(wanted, make_config(sliding_window=64)) == wanted


@pytest.mark.parametrize("wanted", [65, 256, 10_000, None])
def test_contexts_beyond_the_sliding_window_are_refused(wanted: int | None) -> None:
    with pytest.raises(ValueError, match=r"sliding_window=64.* set it to 64 at most"):
        choose(wanted, make_config(sliding_window=64))


def test_a_sliding_window_as_long_as_the_model_hides_nothing() -> None:
    assert choose(None, make_config(sliding_window=256)) == 256
