"""nanovllm: offline batch inference of language models.

Two names are all there is to know: `LLM` runs a checkpoint, `SamplingParams` says how one request is continued.
"""

from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "SamplingParams"]
