"""OutputProcessor: from tokens and log-probabilities to what the user gets.

Requests that stream or have stop strings carry a `Detokenizer`, which is given each token as it comes. The text of all
others is decoded at the end, in one call.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items

from nanovllm.engine.detokenizer import Detokenizer, decode
from nanovllm.engine.model_runner import StepOutput
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.logprobs import Logprobs
from nanovllm.outputs import CompletionOutput, PositionLogprobs, RequestOutput, SeveralCompletions, StreamEvent, TokenLogprob
from nanovllm.utils.text_codec import TextCodec

Entries = list[tuple[int, float, int]]  # (token, logprob, rank) of the best tokens at one position


class OutputProcessor:
    """Follows the running requests' outputs.

    Args:
        codec: of the checkpoint's tokenizer; None if it has none.
    """

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec
        self._tokenizer = None if codec is None else codec.tokenizer
        self._followed: list[Sequence] = []  # unfinished, with a detokenizer

    def reset(self) -> None:
        """Forget all requests."""
        self._followed = []

    def add(self, seq: Sequence, streams: bool) -> None:
        """Follow a new request if its text is needed as it comes."""
        if streams or seq.sampling_params.stop:
            seq.detokenizer = Detokenizer(self._tokenizer, seq.sampling_params)
            self._followed.append(seq)

    # ---- in each step ----

    def take_logprobs(self, output: StepOutput, sampled: Items[Sequence], running: Iterable[Sequence]) -> None:
        """Keep the log-probabilities of a step with the sequences that asked for them."""
        if output.logprobs is not None:
            for row, seq in enumerate(sampled):
                if seq.sampling_params.logprobs is not None:
                    seq.logprobs.append(_entries(output.logprobs, row, seq.sampling_params.logprobs))
        if output.prompt_logprobs:
            by_id = {seq.seq_id: seq for seq in running}
            for part in output.prompt_logprobs:
                known = by_id[part.seq_id].prompt_logprobs
                for row in range(len(part.logprobs.chosen_ids)):
                    known[part.first_position + row] = _entries(part.logprobs, row, part.logprobs.token_ids.shape[1])

    @property
    def is_following(self) -> bool:
        """Whether the tokens of any request are needed as they come."""
        return bool(self._followed)

    def follow(self) -> list[Sequence]:
        """Detokenize what is new; the sequences that a stop string has ended and that still run."""
        stopped: list[Sequence] = []
        for seq in self._followed:
            if _detokenize(seq) and seq.finish_reason != "stop":
                assert seq.detokenizer is not None
                seq.stop_reason = seq.detokenizer.stop_string
                if seq.finish_reason is None:
                    stopped.append(seq)
                else:
                    seq.finish_reason = "stop"  # max_tokens was reached in the same step
        self._followed = [seq for seq in self._followed if seq.finish_reason is None]
        return stopped

    # ---- what the user gets ----

    def make_event(self, seq: Sequence, num_known: int) -> StreamEvent:
        """What is new of a sequence of whose output `num_known` tokens have been told."""
        assert seq.detokenizer is not None, f"request {seq.seq_id} does not stream"
        if seq.finish_reason == "abort":
            seq.detokenizer.finish()
        new_logprobs = seq.logprobs[num_known:]
        return StreamEvent(
            index=seq.prompt_index,
            completion=seq.completion_index,
            request_id=seq.seq_id,
            text=seq.detokenizer.take(),
            token_ids=seq.token_ids[seq.num_prompt_tokens + num_known :].tolist(),
            logprobs=_name_all(seq, new_logprobs, self._token_names(new_logprobs)),
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def make_outputs(self, sequences: Items[Sequence]) -> list[RequestOutput]:
        """One output a prompt, of finished sequences, the completions of each prompt together and in order."""
        texts = self._decode_all(sequences)
        named = (position for seq in sequences for position in (*seq.logprobs, *seq.prompt_logprobs.values()))
        names = self._token_names(named)
        completions = [_make_completion(seq, texts[seq.seq_id], names) for seq in sequences]
        outputs: list[RequestOutput] = []
        for seq, completion in zip(sequences, completions, strict=True):
            if seq.completion_index > 0:
                outputs[-1]["completions"].append(completion)
                continue
            assert seq.finish_time is not None, f"request {seq.seq_id} never ended"
            prompt_logprobs: list[PositionLogprobs | None] | None = None
            if seq.sampling_params.prompt_logprobs is not None:
                positions = range(1, seq.num_prompt_tokens)
                prompt_logprobs = [None, *(_name(seq.prompt_logprobs[position], names) for position in positions)]
            first = seq.first_token_time
            several: SeveralCompletions = {"completions": [completion]} if seq.sampling_params.n > 1 else {}
            outputs.append(
                RequestOutput(
                    **completion,
                    **several,
                    num_prompt_tokens=seq.num_prompt_tokens,
                    num_cached_tokens=seq.num_cached_tokens or 0,
                    time_to_first_token=None if first is None else first - seq.arrival_time,
                    total_time=seq.finish_time - seq.arrival_time,
                    prompt_logprobs=prompt_logprobs,
                )
            )
        return outputs

    def _decode_all(self, sequences: Items[Sequence]) -> dict[int, str]:
        """The text of each sequence, by id: all that were not followed in one call (two if some keep special tokens)."""
        texts = {seq.seq_id: seq.detokenizer.text if seq.detokenizer else "" for seq in sequences}
        for skip in (True, False):
            batch = [s for s in sequences if s.detokenizer is None and s.sampling_params.skip_special_tokens == skip]
            if batch and self._codec is not None:
                decoded = self._codec.decode([seq.text_token_ids() for seq in batch], skip)
                texts.update(zip((seq.seq_id for seq in batch), decoded, strict=True))
        return texts

    def _token_names(self, positions: Iterable[Entries]) -> dict[int, str]:
        """The text of each token that occurs in log-probabilities, each decoded once."""
        token_ids = {token_id for position in positions for token_id, _, _ in position}
        return {token_id: decode(self._tokenizer, [token_id], skip_special_tokens=False) for token_id in token_ids}


def _detokenize(seq: Sequence) -> bool:
    """Give the detokenizer of `seq` its new tokens; whether a stop string was found in them."""
    detokenizer = seq.detokenizer
    assert detokenizer is not None
    for token_id in seq.text_token_ids(start=detokenizer.num_tokens):
        detokenizer.push(token_id)
    if seq.finish_reason is not None or detokenizer.stop_string is not None:
        detokenizer.finish()
    return detokenizer.stop_string is not None


def _entries(logprobs: Logprobs, row: int, k: int) -> Entries:
    """(token, logprob, rank) of the k best and of the chosen one if it is not among them."""
    best = zip(logprobs.token_ids[row, :k].tolist(), logprobs.logprobs[row, :k].tolist(), strict=True)
    entries = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(best, start=1)]
    chosen = int(logprobs.chosen_ids[row])
    if all(token_id != chosen for token_id, _, _ in entries):
        entries.append((chosen, float(logprobs.chosen_logprobs[row]), int(logprobs.chosen_ranks[row])))
    return entries


def _name(entries: Entries, names: Mapping[int, str]) -> PositionLogprobs:
    return [
        TokenLogprob(token_id=token_id, token=names[token_id], logprob=logprob, rank=rank)
        for token_id, logprob, rank in entries
    ]


def _name_all(seq: Sequence, positions: Iterable[Entries], names: Mapping[int, str]) -> list[PositionLogprobs] | None:
    return None if seq.sampling_params.logprobs is None else [_name(one, names) for one in positions]


def _make_completion(seq: Sequence, text: str, names: Mapping[int, str]) -> CompletionOutput:
    assert seq.finish_reason is not None, f"request {seq.seq_id} is unfinished"
    return CompletionOutput(
        text=text,
        token_ids=seq.completion_token_ids,
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
        logprobs=_name_all(seq, seq.logprobs, names),
    )
