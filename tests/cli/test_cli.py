"""generate, chat and the command line itself, as their users meet them."""

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.cli import main
from nanovllm.config import EngineConfig
from nanovllm.sampling_params import SamplingParams as Params

ENGINE = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--num-kvcache-blocks",
    "32",
    "--max-model-len",
    "128",
    "--temperature",
    "0",
]

Expected = Callable[[str, int], str]


@pytest.fixture(scope="module")
def expected(tiny_text_model: Path) -> Expected:
    llm = LLM(tiny_text_model, device="cpu", dtype="float32", num_kvcache_blocks=32, max_model_len=128)

    def generate(prompt: str, max_tokens: int) -> str:
        return llm.generate([prompt], SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)[0]["text"]

    return generate


def test_generate_in_a_process(tiny_text_model: Path, expected: Expected) -> None:
    argv = [sys.executable, "-m", "nanovllm", "generate", "--model", tiny_text_model, *ENGINE, "--max-tokens", "9", "Hello"]
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == expected("Hello", 9) + "\n"


def test_chat_on_a_terminal(tiny_text_model: Path) -> None:
    """Two messages, a Ctrl-C while the third is typed."""
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "nanovllm", "chat", "--model", tiny_text_model, *ENGINE, "--max-tokens", "5"]
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(argv, start_new_session=True, env={**os.environ, "TERM": "dumb"}, **terminal) as process:
        os.close(theirs)
        shown = b""

        def read_to_prompt() -> bytes:
            nonlocal shown
            before = len(shown)
            while not shown[before:].endswith(b"> "):
                shown += os.read(ours, 1000)
            return shown[before:]

        read_to_prompt()
        os.write(ours, b"Hi\n")
        first = read_to_prompt()
        assert first.startswith(b"Hi\r\n")
        os.write(ours, b"/clear\n")
        read_to_prompt()
        os.write(ours, b"Hi\n")
        assert read_to_prompt() == first  # nothing is left of the first conversation
        # Python misses a signal that comes after the prompt is shown and before it waits for a key; a user presses again.
        while not select.select([ours], [], [], 1)[0]:
            process.send_signal(signal.SIGINT)
        with suppress(OSError):  # a terminal's other end has gone
            while rest := os.read(ours, 1000):  # a terminal waits until what it shows is read
                shown += rest
        assert process.wait(60) == 130
        assert shown.endswith(b"nanovllm: interrupted\r\n")
    os.close(ours)


def run(argv: list[object], stdin: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    (tmp_path / "stdin").write_text(stdin)
    with (tmp_path / "stdin").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        return main([str(one) for one in argv])


def test_generate_reads_standard_input(
    tiny_text_model: Path,
    expected: Expected,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["generate", "--model", tiny_text_model, *ENGINE, "--max-tokens", "3"]
    assert run(argv, "Once upon", monkeypatch, tmp_path) == 0
    assert capsys.readouterr().out == expected("Once upon", 3) + "\n"


def test_chat_through_a_pipe(
    tiny_text_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["chat", "--model", tiny_text_model, *ENGINE, "--max-tokens", "4", "--system", "Be brief"]
    assert run(argv, "Hi\n\nAnd you?\n", monkeypatch, tmp_path) == 0
    shown = capsys.readouterr().out
    opening = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    with LLM(tiny_text_model, device="cpu", dtype="float32", num_kvcache_blocks=32, max_model_len=128) as llm:
        params = SamplingParams(temperature=0, max_tokens=4)
        first = llm.chat(opening, params, use_tqdm=False)[0]["text"]
        messages = [*opening, {"role": "assistant", "content": first}, {"role": "user", "content": "And you?"}]
        second = llm.chat(messages, params, use_tqdm=False)[0]["text"]
    assert shown == f"{first}\n{second}\n"
    assert run(argv, "long " * 200, monkeypatch, tmp_path) == 2
    assert "max_model_len=128" in capsys.readouterr().err


def test_interrupt_while_generating(
    tiny_text_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stream(*args: object) -> object:
        yield {"text": "The beg"}
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "stream", stream)
    assert main(["generate", "--model", str(tiny_text_model), *ENGINE, "Hello"]) == 130
    assert capsys.readouterr() == ("The beg\n", "nanovllm: interrupted\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required"),
        (["generat"], "invalid choice: 'generat'"),
        (["generate", "x"], "--model"),
        (["generate", "--model", "m", "--top-k", "few", "x"], "invalid int value: 'few'"),
        (["chat", "--model", "m", "--template-args", "[]"], "it must be a JSON object"),
        (["batch", "--model", "m", "in"], "OUTPUT"),
    ],
)
def test_wrong_words(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "/none/such"], "model /none/such does not exist"),
        (["--model", "/none/such", "--top-p", "2"], "top_p must be"),
        (["--model", "/none/such", "--max-num-seqs", "0"], "max_num_seqs must be at least 1, got 0"),
    ],
)
def test_wrong_values(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *options, "x"]) == 2
    assert message in capsys.readouterr().err


def test_empty_prompt_is_refused(tiny_text_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(tiny_text_model), *ENGINE, ""]) == 2
    assert "prompt 0 is empty" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["batch", "generate", "chat"])
def test_help_tells_of_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for field in (*EngineConfig.__dataclass_fields__, "temperature", "max_tokens", "top_k", "min_p"):
        name = f"--{field.replace('_', '-')}"
        if command == "batch" or name not in ("--seed",):
            assert name in shown
    assert set(Params.__dataclass_fields__) >= {"temperature", "max_tokens"}
    assert "PATH_OR_ID" in shown
