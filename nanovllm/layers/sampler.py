"""The sampler: one token for each row of logits.

The number that picks output token i of a request is a function of the request's seed and i alone (random_numbers.py), and
nothing here mixes rows, so what a request gets does not depend on what else is in its batch. The number picks the token by
the inverse of the cumulative sum of the probabilities: one number a row, instead of one for each word of the vocabulary.

Top-k and top-p (`Filters`; the order is defined in logits_processors.py) look at a few candidates only, found by a bounded
pass: the largest values lie in the blocks with the largest maxima. Rows whose candidates do not suffice, known for certain
once they are there, are done again with more, at last with the vocabulary sorted: it is exact, not an approximation.

On a CPU a few rows at a time are processed, so that they stay in its cache. On a GPU nothing waits for the host until the
tokens are read at the end.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

BLOCK = 128  # words of the vocabulary whose maximum, or sum, is taken first
ROWS_IN_CACHE = 8  # rows of float32 logits that a CPU works on at a time
CANDIDATES = (64, 1024, 8192)  # tried in turn before the whole vocabulary
_UNSOUND, _TOO_FEW = -1, -2  # what stands for a token in a row that has none


class Filters(NamedTuple):
    """What may be sampled. Each [num_rows], on the host; see `SamplingParams` for the meaning."""

    top_k: Tensor  # int64, 0 or less: all
    top_p: Tensor  # float32
    min_p: Tensor  # float32


class Rows(NamedTuple):
    """Some rows and how to sample them, on the logits' device."""

    logits: Tensor  # [rows, vocab_size]
    largest: Tensor  # float32 [rows, 1]
    temperatures: Tensor  # float32 [rows, 1]
    uniforms: Tensor  # float32 [rows, 1]
    filters: Filters | None  # each [rows, 1]


class Sampler(nn.Module):
    """Picks the tokens. It has no parameters: it is a module, like the layers, so that its methods can be compiled."""

    def forward(self, logits: Tensor, temperatures: Tensor, uniforms: Tensor, filters: Filters | None = None) -> Tensor:
        """One token id a row.

        Args:
            logits: [num_rows, vocab_size]; not changed.
            temperatures: float32 [num_rows], on the host; rows with 0 take their largest logit, the first of equals.
            uniforms: float32 [num_rows] in [0, 1), on the host; rows with temperature 0 do not use theirs.
            filters: what may be sampled; None: everything in every row.

        Returns:
            int64 [num_rows], on the host; -1 for a row whose logits have no largest finite value: NaN or plus infinity
            among them, or nothing but minus infinity.
        """
        num_candidates = _first_candidates(temperatures, filters, logits.shape[-1])
        token_ids = self._sample_rows(logits, np.arange(len(logits)), num_candidates, temperatures, uniforms, filters)
        while len(again := np.flatnonzero(token_ids.numpy() == _TOO_FEW)):
            num_candidates[again] = _more_candidates(num_candidates[again], logits.shape[-1])
            token_ids[again] = self._sample_rows(logits, again, num_candidates, temperatures, uniforms, filters)
        return token_ids

    def _sample_rows(
        self,
        logits: Tensor,
        rows: NDArray[np.int64],
        num_candidates: NDArray[np.int64],
        temperatures: Tensor,
        uniforms: Tensor,
        filters: Filters | None,
    ) -> Tensor:
        """Tokens of some rows, int64 on the host; `_TOO_FEW` where there were too few candidates."""
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        uses_top_k = np.zeros(len(temperatures), np.bool_) if filters is None else filters.top_k.numpy() > 0
        kinds = num_candidates[rows] * 2 + uses_top_k[rows]
        for kind in np.unique(kinds):
            members = np.flatnonzero(kinds == kind)
            count = int(num_candidates[rows[members[0]]])
            for chunk in _chunks(members, logits.device):
                some = _take(logits, rows[chunk], temperatures, uniforms, filters)
                if count < 0:
                    picked = self.pick_largest(some)
                elif count == 0:
                    picked = self.pick_any(some)
                else:
                    picked = _pick_filtered(some, count, bool(uses_top_k[rows[chunk[0]]]))
                picked = picked.where(some.largest.squeeze(1).isfinite(), _UNSOUND)
                if len(chunk) == len(rows):
                    token_ids = picked
                else:
                    token_ids[_to(torch.from_numpy(chunk), logits.device)] = picked
        return token_ids.cpu()

    def pick_largest(self, rows: Rows) -> Tensor:
        """The largest, the first of equals: of its block, and of the blocks (`argmax` alone is not vectorised on a CPU)."""
        blocks = _blocks(rows.logits, float("-inf"))
        block = blocks.amax(dim=-1).argmax(dim=-1)
        inside = blocks[torch.arange(len(block), device=block.device), block].argmax(dim=-1)
        return block * BLOCK + inside

    def pick_any(self, rows: Rows) -> Tensor:
        """Among all tokens, but those under min_p. First the block is found, then the token in it."""
        weights = _weights(rows)
        if rows.filters is not None:
            weights.masked_fill_(weights < rows.filters.min_p, 0)
        blocks = _blocks(weights, 0)
        sums = blocks.sum(dim=-1).double().cumsum(dim=-1)  # [rows, blocks]
        target = rows.uniforms * sums[:, -1:]  # in float64 below the total, so that some sum is above it
        block = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)  # beyond it if the row is NaN
        before = F.pad(sums, (1, 0)).gather(1, block)
        inside = blocks[torch.arange(len(block), device=block.device), block.squeeze(1)].double().cumsum(dim=-1)
        # Rounding must not lift the target to the block's total: it is then always a token of some probability.
        target = torch.minimum(target - before, inside[:, -1:].nextafter(torch.zeros_like(target)))
        return (block * BLOCK + torch.searchsorted(inside, target, right=True)).squeeze(1)


# ---- which rows go together ----


def _first_candidates(temperatures: Tensor, filters: Filters | None, vocab_size: int) -> NDArray[np.int64]:
    """[num_rows]: candidates to look at first; 0: the row is not filtered; -1: it is greedy.

    A function of the row's own settings, so that the row's way does not depend on the others'.
    """
    result = np.zeros(len(temperatures), np.int64)
    if filters is not None:
        top_k = filters.top_k.numpy()
        wanted = np.where(top_k > 0, np.minimum(top_k, vocab_size) + 8, 1)  # a few more: equals of the k-th are kept too
        filtered = ((top_k > 0) & (top_k < vocab_size)) | (filters.top_p.numpy() < 1)
        result = np.where(filtered, _more_candidates(wanted - 1, vocab_size), 0)
    result[temperatures.numpy() <= 0] = -1
    return result


def _more_candidates(fewer: NDArray[np.int64], vocab_size: int) -> NDArray[np.int64]:
    steps = np.array([*(step for step in CANDIDATES if step < vocab_size), vocab_size])
    return steps[np.minimum(np.searchsorted(steps, fewer, side="right"), len(steps) - 1)]


def _chunks(members: NDArray[np.int64], device: torch.device) -> Iterator[NDArray[np.int64]]:
    size = ROWS_IN_CACHE if device.type == "cpu" else len(members)
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _take(logits: Tensor, rows: NDArray[np.int64], temperatures: Tensor, uniforms: Tensor, filters: Filters | None) -> Rows:
    if rows[-1] - rows[0] == len(rows) - 1:
        index: slice | Tensor = slice(int(rows[0]), int(rows[-1]) + 1)  # a view
        chosen = logits[index]
    else:
        index = torch.from_numpy(rows)
        chosen = logits[_to(index, logits.device)]

    def column(values: Tensor) -> Tensor:
        return _to(values[index].unsqueeze(1), logits.device)

    return Rows(
        logits=chosen,
        largest=chosen.amax(dim=-1, keepdim=True).float(),  # NaN if there is one
        temperatures=column(temperatures),
        uniforms=column(uniforms),
        filters=None if filters is None else Filters(*map(column, filters)),
    )


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Move without making the host wait."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


# ---- one token a row ----


def _blocks(x: Tensor, fill: float) -> Tensor:
    """[rows, vocab_size] -> [rows, blocks, BLOCK], a view where the size allows it."""
    missing = -x.shape[-1] % BLOCK
    return (F.pad(x, (0, missing), value=fill) if missing else x).unflatten(-1, (-1, BLOCK))


def _weights(rows: Rows) -> Tensor:
    """Probabilities, float32 [rows, vocab_size], but for a factor: that of the most likely token is 1.

    Subtract before dividing: with the tiniest of temperatures the largest is still exp(0) = 1, the others 0.
    """
    return torch.sub(rows.logits.float(), rows.largest).div_(rows.temperatures).exp_()


def _pick_filtered(rows: Rows, num_candidates: int, uses_top_k: bool) -> Tensor:
    """Among the tokens that top_k, top_p and min_p leave, the most likely first; `_TOO_FEW` if they are not all there."""
    assert rows.filters is not None, "rows without filters are not filtered"
    top_k, top_p, min_p = rows.filters
    values, tokens, bound = _candidates(rows.logits, num_candidates)
    weights = ((values - rows.largest) / rows.temperatures).exp()
    cumulative = weights.double().cumsum(dim=-1)
    if uses_top_k:
        kept = values >= values.gather(1, (top_k - 1).clamp(max=num_candidates - 1))
        total = cumulative.gather(1, (kept.sum(dim=-1, keepdim=True) - 1).clamp(min=0))  # none is kept if the row is NaN
    else:
        kept = torch.ones_like(values, dtype=torch.bool)
        total = _blocks(_weights(rows), 0).sum(dim=-1).double().sum(dim=-1, keepdim=True)
    # A token is kept while those more likely than it do not reach top_p: so is the one that crosses the boundary.
    kept &= (cumulative - weights < top_p * total) | (top_p >= 1)
    kept &= weights >= min_p
    kept[:, 0] = True
    last = kept.sum(dim=-1, keepdim=True) - 1  # what is kept is a prefix
    target = rows.uniforms * cumulative.gather(1, last)
    picked = torch.minimum(torch.searchsorted(cumulative, target, right=True), last)
    token_ids = tokens.gather(1, picked)
    if num_candidates < rows.logits.shape[-1]:
        token_ids = token_ids.where(values.gather(1, last) > bound, _TOO_FEW)
    return token_ids.squeeze(1)


def _candidates(logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest values of each row, descending, equals in the order of their tokens.

    Returns:
        (values float32 [rows, count], tokens int64 [rows, count], bound float32 [rows, 1]): all values above `bound` are
        there; of those equal to it some may be missing.
    """
    if count == logits.shape[-1]:
        values, tokens = logits.float().sort(dim=-1, descending=True, stable=True)
        return values, tokens, values[:, -1:]
    blocks = _blocks(logits, float("-inf"))  # [rows, blocks, BLOCK]
    bound = torch.full_like(logits[:, :1], float("-inf"))
    first = None
    if count * 4 < blocks.shape[1]:
        # The `count` largest values lie in the `count` blocks with the largest maxima.
        maxima, first = blocks.amax(dim=-1).topk(count + 1, dim=-1)
        bound, first = maxima[:, -1:], first[:, :-1].sort(dim=-1).values
        blocks = blocks.gather(1, first.unsqueeze(-1).expand(-1, -1, BLOCK))
    values, places = blocks.flatten(1).topk(count, dim=-1)
    bound = torch.maximum(bound, values[:, -1:]).float()
    places = places.sort(dim=-1).values
    values, order = blocks.flatten(1).gather(1, places).float().sort(dim=-1, descending=True, stable=True)
    places = places.gather(1, order)
    if first is not None:
        places = first.gather(1, places // BLOCK) * BLOCK + places % BLOCK
    return values, places, bound
