"""LLMEngine alone: its loop around an executor that only pretends to compute, and what it promises to other modules."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nanovllm
from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine import llm_engine
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import StepOutput
from nanovllm.engine.scheduled_batch import ScheduledBatch
from nanovllm.models.config import ModelConfig

CheckpointFactory = Callable[..., Path]

PACKAGE = Path(nanovllm.__file__).parent
VOCAB_SIZE = 320


class CountingExecutor:
    """Continues every sequence by its last token plus one. Keeps what it was told, as a rank would."""

    def __init__(self, folder: Path, model_config: ModelConfig, config: EngineConfig, max_model_len: int) -> None:
        self.block_size = config.kvcache_block_size or 16
        self.num_kvcache_blocks = config.num_kvcache_blocks or 16
        self.max_num_batched_tokens = config.max_num_batched_tokens or 32
        self.max_model_len = max_model_len
        self.batches: list[ScheduledBatch] = []
        self.calls: list[str] = []
        self.error: BaseException | None = None
        self.token_ids: dict[int, list[int]] = {}  # by row
        self.num_computed: dict[int, int] = {}

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        self.calls.append("execute")
        if self.error is not None:
            raise self.error
        self.batches.append(batch)
        for started in batch.started:
            self.token_ids[started.row] = list(started.token_ids)
            self.num_computed[started.row] = started.num_computed_tokens
        sampled = []
        for row, num_tokens in zip(batch.rows.tolist(), batch.num_tokens.tolist(), strict=True):
            self.num_computed[row] += num_tokens
            if self.num_computed[row] == len(self.token_ids[row]):
                self.token_ids[row].append((self.token_ids[row][-1] + 1) % VOCAB_SIZE)
                sampled.append(self.token_ids[row][-1])
        return StepOutput(np.array(sampled, np.int64))

    def exit(self) -> None:
        self.calls.append("exit")


MakeEngine = Callable[..., tuple[LLM, CountingExecutor]]


@pytest.fixture
def make_engine(checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    monkeypatch.setattr(llm_engine, "SingleRankExecutor", CountingExecutor)

    def make(folder: Path | None = None, **options: object) -> tuple[LLM, CountingExecutor]:
        llm = LLM(folder or checkpoint(), **options)
        assert isinstance(llm.executor, CountingExecutor)
        return llm, llm.executor

    return make


def params(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **options)


def run_steps(llm: LLMEngine) -> tuple[dict[int, list[int]], list[int]]:
    finished: dict[int, list[int]] = {}
    counts = []
    while not llm.is_finished():
        outputs, num_tokens = llm.step()
        finished.update(outputs)
        counts.append(num_tokens)
    return finished, counts


# ---- the loop ----


def test_loop_takes_the_executors_tokens(make_engine: MakeEngine) -> None:
    llm, _ = make_engine()
    first = llm.add_request([10, 20, 30], params(4))
    second = llm.add_request([7], params(1))
    finished, counts = run_steps(llm)
    assert finished == {first: [31, 32, 33, 34], second: [8]}
    assert counts == [4, -1, -1, -1]


def test_loop_uses_the_executors_sizes(make_engine: MakeEngine) -> None:
    llm, executor = make_engine(num_kvcache_blocks=5, kvcache_block_size=48, max_num_batched_tokens=7, max_model_len=100)
    assert llm.scheduler.block_manager.num_blocks == 5
    assert llm.scheduler.block_manager.block_size == 48
    assert llm.scheduler.max_num_batched_tokens == 7
    assert llm.max_model_len == executor.max_model_len == 100


def test_prompt_in_chunks_is_sampled_once(make_engine: MakeEngine) -> None:
    llm, executor = make_engine(max_num_batched_tokens=10)
    seq_id = llm.add_request(list(range(25)), params(3))
    finished, counts = run_steps(llm)
    assert finished == {seq_id: [25, 26, 27]}
    assert counts == [10, 10, 5, -1, -1]
    assert [batch.num_tokens.tolist() for batch in executor.batches] == [[10], [10], [5], [1], [1]]


def test_a_step_with_any_prefill_is_counted_as_prefill(make_engine: MakeEngine) -> None:
    llm, _ = make_engine()
    llm.add_request([1, 2, 3], params(5))
    assert llm.step()[1] == 3
    assert llm.step()[1] == -1
    llm.add_request([4, 5], params(5))
    assert llm.step()[1] == 2  # beside one decode
    assert llm.step()[1] == -2


def test_requests_finish_in_the_order_of_arrival(make_engine: MakeEngine) -> None:
    llm, _ = make_engine()
    ids = [llm.add_request([100 + index], params(2)) for index in range(4)]
    assert ids == sorted(ids)
    outputs = [llm.step()[0], llm.step()[0]]
    assert outputs[0] == []
    assert [seq_id for seq_id, _ in outputs[1]] == ids


def test_a_request_is_sent_whole_once(make_engine: MakeEngine) -> None:
    llm, executor = make_engine()
    llm.add_request(list(range(20)), params(20, temperature=0.5, seed=9))
    run_steps(llm)
    llm.add_request([1], params(1))
    run_steps(llm)
    started = [one for batch in executor.batches for one in batch.started]
    assert [len(one.token_ids) for one in started] == [20, 1]
    assert (started[0].seed, started[0].sampling_params.temperature) == (9, 0.5)
    assert len(started[0].block_table) == 2
    new_blocks = [new_block for batch in executor.batches for new_block in batch.new_blocks]
    assert new_blocks == [(started[0].row, started[0].block_table[-1] + 1)]


def test_step_with_nothing_to_do_computes_nothing(make_engine: MakeEngine) -> None:
    llm, executor = make_engine()
    assert llm.is_finished()
    assert llm.step() == ([], 0)
    assert executor.calls == []


@pytest.mark.parametrize("eos", [3, [3], [3, 1, 200]])
def test_loop_ends_at_end_of_sequence_tokens(
    checkpoint: CheckpointFactory, make_engine: MakeEngine, eos: int | list[int]
) -> None:
    llm, _ = make_engine(checkpoint(eos_token_id=eos))
    ids = [llm.add_request([0], params(10, ignore_eos=ignore)) for ignore in (False, True)]
    first_eos = 3 if eos != [3, 1, 200] else 1
    assert run_steps(llm)[0] == {ids[0]: list(range(1, first_eos + 1)), ids[1]: list(range(1, 11))}


def test_output_is_a_copy(make_engine: MakeEngine) -> None:
    llm, _ = make_engine()
    prompt = [1, 2, 3]
    llm.add_request(prompt, params(2))
    prompt.append(9)
    finished, _ = run_steps(llm)
    assert finished[0] == [4, 5]
    assert llm.generate([(1, 2, 3)], params(2), use_tqdm=False)[0]["token_ids"] == [4, 5]


# ---- errors ----


@pytest.mark.parametrize("error", [RuntimeError("broken"), MemoryError("full"), KeyboardInterrupt(), SystemExit(1)])
def test_requests_are_dropped_after_an_error(make_engine: MakeEngine, error: BaseException) -> None:
    llm, executor = make_engine(max_num_seqs=2)
    llm.add_request([1, 2, 3], params(5))
    llm.add_request([4, 5], params(5))
    llm.step()
    executor.error = error
    with pytest.raises(type(error)) as caught:
        llm.step()
    assert caught.value is error
    assert executor.calls == ["execute", "execute"]
    assert llm.is_finished()
    executor.error = None
    outputs = llm.generate([[5], [50]], params(2), use_tqdm=False)  # in the rows that the dropped ones had
    assert [output["token_ids"] for output in outputs] == [[6, 7], [51, 52]]
    assert [len(batch.started) for batch in executor.batches] == [2, 2, 0]


@pytest.mark.parametrize("token_ids", [[], [1, 2]])
def test_executor_that_gives_the_wrong_number_of_tokens(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, token_ids: list[int]
) -> None:
    llm, executor = make_engine()
    monkeypatch.setattr(executor, "execute", lambda batch: StepOutput(np.array(token_ids, np.int64)))
    llm.add_request([1, 2, 3], params(5))
    with pytest.raises(AssertionError, match="sampled"):
        llm.step()
    assert llm.is_finished()
    assert llm.scheduler.block_manager.num_free_blocks == llm.scheduler.block_manager.num_blocks
    assert len(llm.scheduler.running.free_rows) == llm.scheduler.max_num_seqs


def test_refused_requests_use_up_no_ids(make_engine: MakeEngine) -> None:
    llm, _ = make_engine()
    assert llm.add_request([1], params(1)) == 0
    with pytest.raises(ValueError, match="empty"):
        llm.add_request([], params(1))
    with pytest.raises(ValueError, match="add_request takes n=1, got 2"):
        llm.add_request([1], SamplingParams(n=2))
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        llm._make_sequences([[1], []], [params(1)] * 2)
    assert llm.add_request([1], params(1)) == 1


def test_exit_drops_requests_and_lets_the_executor_go(make_engine: MakeEngine) -> None:
    llm, executor = make_engine()
    llm.add_request([1, 2, 3], params(5))
    llm.step()
    llm.exit()
    assert llm.is_finished()
    assert executor.calls == ["execute", "exit"]
    llm.exit()
    assert llm.is_finished()


# ---- seeds ----


def test_seeds_are_those_asked_for_or_drawn_from_the_engines(make_engine: MakeEngine) -> None:
    def seeds_of(engine_seed: int | None) -> list[int]:
        llm, executor = make_engine(seed=engine_seed)
        requests = [params(1), params(1, seed=7), params(1), params(1, seed=0)]
        llm.generate([[1]] * 4, requests, use_tqdm=False)
        return [one.seed for batch in executor.batches for one in batch.started]

    first, second = seeds_of(3), seeds_of(3)
    assert first == second
    assert (first[1], first[3]) == (7, 0)
    assert first[0] != first[2]
    assert seeds_of(4)[0] != first[0]
    assert seeds_of(None) != seeds_of(None)
    assert all(0 <= seed < 2**63 for seed in first)


# ---- max_model_len ----


def test_max_model_len_is_the_models_unless_that_is_much(checkpoint: CheckpointFactory, make_engine: MakeEngine) -> None:
    assert make_engine(checkpoint(max_position_embeddings=300))[0].max_model_len == 300
    assert make_engine(checkpoint(max_position_embeddings=40960))[0].max_model_len == 4096
    assert make_engine(checkpoint(max_position_embeddings=40960), max_model_len=9000)[0].max_model_len == 9000


def test_max_model_len_beyond_the_models_is_reduced_and_said(
    checkpoint: CheckpointFactory, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    llm, _ = make_engine(checkpoint(max_position_embeddings=300), max_model_len=301)
    assert llm.max_model_len == 300
    assert "max_model_len=301 is reduced to 300" in caplog.text


def test_sliding_window_bounds_max_model_len(checkpoint: CheckpointFactory, make_engine: MakeEngine) -> None:
    folder = checkpoint("MistralForCausalLM", sliding_window=64)
    with pytest.raises(ValueError, match=r"sliding_window=64.*max_model_len is 65: set it to 64 at most"):
        make_engine(folder, max_model_len=65)
    with pytest.raises(ValueError, match=r"sliding_window=64.*max_model_len is 1024"):
        make_engine(folder)
    assert make_engine(folder, max_model_len=64)[0].max_model_len == 64


# ---- what is computed ----


def test_logits_are_computed_of_sampled_tokens_only(checkpoint: CheckpointFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(checkpoint(), max_num_batched_tokens=16, num_kvcache_blocks=16, max_model_len=64, device="cpu")
    model = llm.executor._runner.model  # type: ignore[attr-defined]
    forward, compute_logits = model.forward, model.compute_logits
    num_tokens: list[int] = []
    num_rows: list[int] = []

    def count_tokens(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        num_tokens.append(len(input_ids))
        return forward(input_ids, positions)

    def count_rows(hidden_states: torch.Tensor) -> torch.Tensor:
        num_rows.append(len(hidden_states))
        return compute_logits(hidden_states)

    monkeypatch.setattr(model, "forward", count_tokens)
    monkeypatch.setattr(model, "compute_logits", count_rows)
    llm.generate([list(range(40)), [1, 2]], [params(3), params(2)], use_tqdm=False)
    # Chunks 16, 16, then the last 8 with the whole second prompt; then two decodes, and one.
    assert num_tokens == [16, 16, 10, 2, 1]
    assert num_rows == [2, 2, 1]  # no logits for the chunks that end no prompt


# ---- modules without torch ----


def module_file(name: str) -> Path | None:
    """The file of a module or package of nanovllm."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()), None)


def imported_modules(file: Path) -> set[str]:
    """What a file imports when it is imported: all but what stands inside of functions or under TYPE_CHECKING."""
    names: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(file.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import, which this test does not follow"
            assert node.module is not None
            names.add(node.module)
            names |= {name for alias in node.names if module_file(name := f"{node.module}.{alias.name}") is not None}
        nodes += ast.iter_child_nodes(node)
    return names


def all_imports(module: str) -> set[str]:
    """Every module that `module` needs, through nanovllm's own, whose package files apart."""
    needed: set[str] = set()
    pending = [module]
    while pending:
        file = module_file(pending.pop())
        if file is None or file.name == "__init__.py":
            continue
        new = imported_modules(file) - needed
        needed |= new
        pending += [name for name in new if name.split(".")[0] == "nanovllm"]
    return needed


@pytest.mark.parametrize(
    ("module", "array_modules"), [("block_manager", set()), ("scheduler", {"numpy"}), ("sequence", set())]
)
def test_modules_that_need_no_torch(module: str, array_modules: set[str]) -> None:
    names = all_imports(f"nanovllm.engine.{module}")
    assert names, "nothing was followed"
    roots = {name.split(".")[0] for name in names}
    assert roots & {"torch", "numpy", "transformers", "safetensors"} == array_modules


def test_following_of_imports_finds_torch_where_it_is() -> None:
    assert "torch" in all_imports("nanovllm.engine.llm_engine")
    assert "nanovllm.engine.model_runner" in all_imports("nanovllm.engine.llm_engine")
