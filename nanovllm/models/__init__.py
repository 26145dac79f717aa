"""The models: one file a family. This is the registry: the architecture in config.json -> our class."""

import json
from pathlib import Path

from transformers import AutoConfig

from nanovllm.models.config import ModelConfig, read_model_config
from nanovllm.models.llama import LlamaForCausalLM, MistralForCausalLM
from nanovllm.models.qwen2 import Qwen2ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM

MODELS: dict[str, type[Qwen3ForCausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
}


def get_model_class(architecture: str) -> type[Qwen3ForCausalLM]:
    """The class that runs an architecture.

    Raises:
        ValueError: none does.
    """
    if architecture not in MODELS:
        raise ValueError(f"architecture {architecture!r} is not supported; {', '.join(MODELS)} are")
    return MODELS[architecture]


def load_model_config(folder: Path) -> ModelConfig:
    """Read the config.json of a checkpoint folder.

    Raises:
        ValueError: a file that is no config, an architecture or an option that is not supported.
    """
    path = folder / "config.json"
    try:
        architecture = (json.loads(path.read_text(encoding="utf-8")).get("architectures") or ["none"])[0]
        get_model_class(architecture)  # first: Transformers may not know the model at all
        return read_model_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), architecture)
    except Exception as error:  # Transformers' own checks raise of many types
        raise ValueError(f"{path}: {error}") from error
