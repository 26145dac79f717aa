"""The progress bar of `LLM.generate`."""

from typing import Any

from tqdm.auto import tqdm

from nanovllm.engine.llm_engine import StepResult


class Progress:
    """A bar of finished requests, with the speed of the last prefill and of the last decode beside it."""

    def __init__(self, num_requests: int, enabled: bool) -> None:
        self._bar: Any = tqdm(total=num_requests, desc="Generating", dynamic_ncols=True, disable=not enabled)
        self._speeds: dict[str, str] = {}

    def update(self, step: StepResult) -> None:
        """Show one step."""
        for name, num_tokens in (("Prefill", step.num_prefill_tokens), ("Decode", step.num_decode_tokens)):
            if num_tokens:
                self._speeds[name] = f"{num_tokens / step.seconds:.0f}tok/s"
        self._bar.set_postfix(self._speeds, refresh=False)
        self._bar.update(len(step.finished))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
