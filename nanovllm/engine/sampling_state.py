"""SamplingState: what one rank knows of how its running sequences are sampled, by row as in `InputBatch`.

Temperatures and seeds are every request's; the other options are few requests', and a step in which no row uses any of
them costs one look at a boolean array.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nanovllm.engine.scheduled_batch import StartedSequence
from nanovllm.layers.logits_processors import Entries, LogitsEdits
from nanovllm.layers.random_numbers import STEP, start_states, uniform_of
from nanovllm.layers.sampler import Filters
from nanovllm.sampling_params import SamplingParams

Int64Array = NDArray[np.int64]
NO_LOGPROBS = -1


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """What the sampled rows of one step ask for beside temperature and seed; None where no row asks for it."""

    filters: Filters | None
    edits: LogitsEdits | None
    num_logprobs: Int64Array | None  # [num_sampled], NO_LOGPROBS where none are asked for


class SamplingState:
    """The sampling settings of each row.

    Args:
        max_num_seqs: rows.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.temperatures = np.zeros(max_num_seqs, np.float32)
        self.random_states = np.zeros(max_num_seqs, np.uint64)  # plus `STEP` times its tokens: of its next number
        self.top_k = np.zeros(max_num_seqs, np.int64)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.num_logprobs = np.full(max_num_seqs, NO_LOGPROBS, np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.is_edited = np.zeros(max_num_seqs, np.bool_)
        self.has_options = np.zeros(max_num_seqs, np.bool_)
        self._edited: dict[int, tuple[SamplingParams, tuple[int, ...]]] = {}  # with the tokens that min_tokens forbids

    def start(self, started: StartedSequence) -> None:
        """Take in the settings of a sequence that joins."""
        row, params = started.row, started.sampling_params
        self.temperatures[row] = params.temperature
        first = np.array([-started.num_prompt_tokens]).view(np.uint64)  # output tokens are numbered from 0
        self.random_states[row] = start_states(np.array([started.seed], np.uint64), first)[0]
        self.top_k[row] = params.top_k
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.num_logprobs[row] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        self.num_prompt_tokens[row] = started.num_prompt_tokens
        self.is_edited[row] = edits = (
            params.allowed_token_ids is not None
            or bool(params.logit_bias)
            or params.min_tokens > 0
            or (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)
        )
        if edits:
            self._edited[row] = (params, started.stop_token_ids)
        filters = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self.has_options[row] = edits or filters or params.logprobs is not None

    def draw(self, rows: Int64Array, num_tokens: Int64Array) -> NDArray[np.float32]:
        """The numbers that pick the next tokens.

        Args:
            rows: [num_rows], of which sequences.
            num_tokens: [..., num_rows], how many tokens each has before.
        """
        return uniform_of(self.random_states[rows] + num_tokens.view(np.uint64) * STEP)

    def options(self, rows: Int64Array, num_tokens: Int64Array, token_ids: NDArray[np.int32]) -> SamplingOptions | None:
        """What `rows` ask for in this step.

        Args:
            rows: [num_sampled].
            num_tokens: [num_sampled], prompt and output of each so far.
            token_ids: [max_num_seqs, max_model_len], of all rows that are edited.
        """
        if not np.count_nonzero(self.has_options[rows]):  # a third of the time of `any`
            return None
        top_k, top_p, min_p = self.top_k[rows], self.top_p[rows], self.min_p[rows]
        filters = None
        if (top_k > 0).any() or (top_p < 1).any() or (min_p > 0).any():
            filters = Filters(torch.from_numpy(top_k), torch.from_numpy(top_p), torch.from_numpy(min_p))
        num_logprobs = self.num_logprobs[rows]
        edits = _Collector()
        for index in np.flatnonzero(self.is_edited[rows]).tolist():
            row = int(rows[index])
            edits.add(index, *self._edited[row], token_ids[row, : num_tokens[index]], int(self.num_prompt_tokens[row]))
        return SamplingOptions(
            filters=filters,
            edits=edits.collect(),
            num_logprobs=None if (num_logprobs == NO_LOGPROBS).all() else num_logprobs,
        )


class _Part(NamedTuple):
    """Entries of one row."""

    row: int
    tokens: Int64Array  # [n]
    values: NDArray[np.float32]  # [n] or []


class _Collector:
    """Gathers the entries of several rows."""

    def __init__(self) -> None:
        self._parts: dict[str, list[_Part]] = {}
        self._restricted_rows: list[int] = []

    def add(
        self,
        index: int,
        params: SamplingParams,
        stop_token_ids: tuple[int, ...],
        token_ids: NDArray[np.int32],
        num_prompt_tokens: int,
    ) -> None:
        """Add what row `index` of the logits asks for, of which `token_ids` are prompt and output."""
        output = token_ids[num_prompt_tokens:]
        if params.allowed_token_ids is not None:
            self._restricted_rows.append(index)
            self._add("allowed", index, tuple(params.allowed_token_ids), 0)
        if len(output) < params.min_tokens and stop_token_ids:
            self._add("forbidden", index, stop_token_ids, -np.inf)
        if params.logit_bias:
            biases = dict(params.logit_bias)
            self._add("biases", index, list(biases), list(biases.values()))
        if params.repetition_penalty != 1:
            self._add("repetition", index, token_ids, params.repetition_penalty)
        if (params.presence_penalty or params.frequency_penalty) and len(output):
            tokens, counts = np.unique(output, return_counts=True)
            self._add("output_penalties", index, tokens, params.frequency_penalty * counts + params.presence_penalty)

    def _add(self, kind: str, index: int, tokens: ArrayLike, values: ArrayLike) -> None:
        part = _Part(index, np.asarray(tokens, np.int64), np.asarray(values, np.float32))
        self._parts.setdefault(kind, []).append(part)

    def collect(self) -> LogitsEdits | None:
        """All that was added; None if nothing was."""
        if not self._parts:
            return None
        entries = {kind: _join(parts) for kind, parts in self._parts.items()}
        rows = torch.tensor(self._restricted_rows) if self._restricted_rows else None
        return LogitsEdits(restricted_rows=rows, **entries)


def _join(parts: list["_Part"]) -> Entries:
    return Entries(
        rows=torch.from_numpy(np.concatenate([np.full(len(part.tokens), part.row) for part in parts])),
        tokens=torch.from_numpy(np.concatenate([part.tokens for part in parts])),
        values=torch.from_numpy(np.concatenate([np.broadcast_to(part.values, len(part.tokens)) for part in parts])),
    )
