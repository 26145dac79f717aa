"""gpu_check.py where there is no GPU: what it says, and its pieces that need none."""

import json
from collections.abc import Callable
from pathlib import Path

import gpu_check
import pytest
import torch


def test_without_a_gpu_it_says_so_and_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--json", str(tmp_path / "result.json")])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == gpu_check.NO_GPU  # a text: printed to stderr, with exit status 1
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(model: Path) -> gpu_check.Result:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_check, "CHECKS", {"broken": broken, "sound": lambda model: {"passed": True}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "describe_machine", lambda: {"hardware": "a card"})
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--model", "x", "--json", str(tmp_path / "result.json")])
    with pytest.raises(SystemExit, match="gpu-check failed"):
        gpu_check.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["machine"] == {"hardware": "a card"}
    assert result["checks"]["broken"]["error"] == "RuntimeError: no kernel image"
    assert result["checks"]["sound"]["passed"] is True
    assert "a card" in capsys.readouterr().out


def test_compare(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    folder = checkpoint("Qwen3ForCausalLM")
    expected = gpu_check.greedy_tokens(folder, 2, dtype="float32")
    same = {"passed": True, "agreement": 1.0, "differ": 0, "worst_gap": 0.0}
    assert gpu_check.compare(folder, expected, expected) == same
    wrong = [expected[0], [*expected[1][:5], (expected[1][5] + 1) % 320, *expected[1][6:]]]
    result = gpu_check.compare(folder, expected, wrong)
    assert (result["passed"], result["differ"]) == (False, 1)
    assert result["agreement"] == round((len(expected[0]) + 5) / sum(map(len, expected)), 4)
    with monkeypatch.context() as lenient:
        lenient.setattr(gpu_check, "NEAR", 2.0)  # no two logits are further apart
        assert gpu_check.compare(folder, expected, wrong)["passed"] is True


@pytest.mark.parametrize("check", ["graphs", "backends", "transformers"])
def test_checks_of_whole_models_run(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    # On a CPU they compare little: there are no graphs, and no backend but the plain one.
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "requests", lambda number, vocab_size: [([1, 2, 3], 4), ([5] * 20, 6)])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = gpu_check.CHECKS[check](checkpoint("Qwen3ForCausalLM"))
    assert result["passed"] is True
    if check == "backends":
        assert "TRITON_INTERPRET=1" in str(result["triton"])
        assert "NVIDIA GPU" in str(result["flash_attn"])
    else:
        assert result["agreement"] == 1.0
