"""ParallelExecutor: rank 0 in this process, the others in `Workers`.

Each step is one message; rank 0 samples, and the tokens go over with the next step. After a failure that leaves ranks in
different places all of them are ended at once, and the next step starts new ones. Until then nothing is left running.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nanovllm.config import EngineConfig
from nanovllm.engine.model_runner import NO_TOKENS, ModelRunner, StepOutput
from nanovllm.engine.scheduled_batch import ScheduledBatch, pack_step
from nanovllm.engine.workers import GRACE, Job, WorkerError, Workers
from nanovllm.models.config import ModelConfig
from nanovllm.utils.collectives import PeerLostError
from nanovllm.utils.device import choose_device
from nanovllm.utils.interrupts import hold_interrupts
from nanovllm.utils.ranks import Ranks


class ParallelExecutor:
    """Several ranks. Arguments as `SingleRankExecutor`'s.

    Raises:
        ValueError: the model, or the machine, cannot be divided so; or what a rank says of the checkpoint.
        WorkerError: a worker failed to start.
    """

    def __init__(self, folder: Path, model_config: ModelConfig, config: EngineConfig, max_model_len: int) -> None:
        self._size = config.tensor_parallel_size
        self._num_threads = max(1, torch.get_num_threads() // self._size)
        ranks = Ranks(0, self._size)
        ranks.num_heads(model_config.num_heads)
        self._device = ranks.place(choose_device(config.device))
        self._make_runner = partial(ModelRunner, folder, model_config, config, max_model_len)
        self._workers: Workers | None = None
        self._runner: ModelRunner | None = None
        self._sampled = NO_TOKENS  # by the last step
        self._exited = False
        self._start()
        assert self._runner is not None, "started above"
        self.block_size: int = self._runner.block_size
        self.num_kvcache_blocks: int = self._runner.num_kvcache_blocks
        self.max_num_batched_tokens: int = self._runner.max_num_batched_tokens
        # The scheduler goes by this number, also after new ranks were started with less memory free.
        config = replace(config, num_kvcache_blocks=self.num_kvcache_blocks)
        self._make_runner = partial(ModelRunner, folder, model_config, config, max_model_len)

    def execute(self, batch: ScheduledBatch) -> StepOutput:
        """See `Executor.execute`.

        Raises:
            WorkerError: a worker failed. All ranks have been ended; the next step, or the next `generate`, starts new ones.
        """
        if self._exited:
            raise RuntimeError("the engine has exited: make a new LLM")
        if self._workers is None:
            self._start()
        assert self._workers is not None, "started above"
        assert self._runner is not None, "started above"
        with hold_interrupts(), _torch_threads(self._num_threads):  # all ranks come to the step's end
            try:
                sampled, self._sampled = self._sampled, NO_TOKENS
                self._workers.send(pack_step(sampled, batch))
                output = self._runner.execute(batch)
                self._workers.check()  # one that was lost on a GPU leaves nonsense
                self._sampled = output.token_ids
            except BaseException as error:
                self._recover(error)
                raise
        return output

    def exit(self) -> None:
        """See `Executor.exit`."""
        self._exited = True
        self._stop()

    def _start(self) -> None:
        """Start the workers, and load the model together with them."""
        try:
            with _torch_threads(self._num_threads):
                self._workers = Workers()
                self._finalizer = weakref.finalize(self, self._workers.close)  # `del llm`, and the interpreter's end
                job = Job(self._make_runner, self._device, self._size, self._num_threads)
                collectives = self._workers.start(job)
                self._runner = self._make_runner(Ranks(0, self._size, collectives))
                self._workers.settle()
                self._sampled = NO_TOKENS
        except BaseException as error:
            if isinstance(error, PeerLostError):
                self._find_cause()
            self._stop()
            raise

    def _recover(self, error: BaseException) -> None:
        """After an error in a step: go on with the workers if all are through with it, else end them."""
        if isinstance(error, WorkerError) or not self._find_cause() or isinstance(error, PeerLostError):
            self._stop()

    def _find_cause(self) -> bool:
        """Hear what the workers say of an error.

        Returns:
            Whether all are through with what they were sent; else they wait in a collective that rank 0 has left.

        Raises:
            WorkerError: one of them is the cause. All have been ended.
        """
        assert self._workers is not None, "asked only while they run"
        try:
            self._workers.settle(GRACE)
        except TimeoutError:
            return False
        except BaseException:
            self._stop()
            raise
        return True

    def _stop(self) -> None:
        if self._workers is not None:
            self._finalizer()
        self._workers = self._runner = None


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    """The ranks share the processor; what the caller computes between the steps has all of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
