"""TextCodec: the tokens and texts of the checkpoint's tokenizer, whoever makes them."""

import logging
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
from fastokens import Tokenizer as FastTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanovllm.utils import text_codec
from nanovllm.utils.text_codec import TextCodec

PIECES = [
    *("hello", "the quick brown fox", " ", "  ", "\n", "\n\n", "\t", "\r\n", "12345", "3.14", "it's", "IT'S", "!!!"),
    *("don\u2019t", "e\u0301", "\u0301\u0327", "q\u0307\u0323", "\u00c5", "\u212b", "\ufb01ne", "\ufdfa", "\U0001d4b3"),
    *("ß", "İ", "ǅ", "¼", "²", "Ⅷ", "٣", "日本語", "한국어", "עברית", "हिन्दी", "ไทย", "👩\u200d👧", "🏳\ufe0f\u200d🌈"),
    *("\u00a0", "\u200b", "\u3000", "\ufeff", "\u2028", "\x00", "\x7f", "▁", "Ġ", "<0x0A>", "__init__", "http://a.b/c?d=e"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "<unk>", "<think>", " lead", "trail ", "solo", "solos"),
    *("a" * 300, "ab" * 200, " " * 40, "\n " * 20, "def f(x):\n    return x"),
]
SPLIT = r"(?i:'s|'t|'re|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def draw_texts(count: int, seed: int) -> list[str]:
    rng = Random(seed)
    texts: list[str] = []
    for _ in range(count):
        if rng.random() < 0.7:
            texts.append("".join(rng.choices(PIECES, k=rng.randint(0, 10))))
        else:
            planes = [(0x20, 0x7F), (0x80, 0x3000), (0x3000, 0xD800), (0xE000, 0x110000)]
            texts.append("".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randint(0, 30))))
    return texts


def trained(normalizer: Any, ignore_merges: bool) -> PreTrainedTokenizerFast:
    """A tokenizer as Qwen's or Llama 3's, with added tokens of every kind."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, special_tokens=["<s>", "<|im_start|>"])
    corpus = [path.read_text() for path in sorted(Path(text_codec.__file__).parent.glob("*.py"))]
    tokenizer.train_from_iterator([*corpus, *PIECES], trainer)
    special = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    edges = AddedToken(" lead", lstrip=True), AddedToken("trail ", rstrip=True), AddedToken("solo", single_word=True)
    tokenizer.add_tokens([*edges, AddedToken("<think>", normalized=False), AddedToken("\ufb01ne", normalized=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def plain(smollm2: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_codec, "ENOUGH", 10)
    monkeypatch.setattr(text_codec, "TRIAL", 100)


def settle(codec: TextCodec) -> TextCodec:
    """Encode until it is decided who encodes."""
    deadline = time.monotonic() + 60
    while not codec._is_settled and time.monotonic() < deadline:
        codec.encode(["some text, of which there is enough"])
        time.sleep(0.01)
    return codec


def check(codec: TextCodec, texts: list[str]) -> None:
    for add in (True, False):
        expected = codec.tokenizer(texts, add_special_tokens=add)["input_ids"]
        assert codec.encode(texts, add_special_tokens=add) == expected
        assert [codec.encode([text], add_special_tokens=add)[0] for text in texts] == expected


def check_decoding(codec: TextCodec) -> None:
    """Tokens in any order make bytes that are no characters, and there are ids that are no tokens."""
    rng = Random(4)
    size = codec.tokenizer.backend_tokenizer.get_vocab_size()
    token_ids = [[rng.randrange(size + 5) for _ in range(rng.randint(0, 30))] for _ in range(3000)]
    short = [[rng.randrange(300) for _ in range(4)] for _ in range(3000)]  # those of single bytes are among the first
    for skip in (True, False):
        expected = codec.tokenizer.backend_tokenizer.decode_batch(token_ids + short, skip_special_tokens=skip)
        assert codec.decode(token_ids + short, skip) == expected
        assert expected == codec.tokenizer.batch_decode(
            token_ids + short, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        assert codec.decode([], skip) == []


def test_the_tokens_of_a_real_tokenizer(plain: PreTrainedTokenizerFast) -> None:
    codec = settle(TextCodec(plain))
    assert codec._fast is not None
    check(codec, draw_texts(3000, seed=1))  # with bytes that have no token: fastokens refuses them, they are left out
    check(codec, ["a text without them"])
    check_decoding(codec)


@pytest.mark.parametrize(
    ("normalizer", "ignore_merges"), [(normalizers.NFC(), False), (None, True)], ids=["like Qwen", "like Llama 3"]
)
def test_the_tokens_of_other_tokenizers(normalizer: Any, ignore_merges: bool) -> None:
    codec = settle(TextCodec(trained(normalizer, ignore_merges)))
    assert codec._fast is not None
    check(codec, draw_texts(3000, seed=2))
    check_decoding(codec)


def test_a_tokenizer_that_is_not_supported_stays(caplog: pytest.LogCaptureFixture) -> None:
    codec = TextCodec(trained(normalizers.NFKC(), ignore_merges=False))
    with caplog.at_level(logging.INFO):
        settle(codec)
    assert codec._fast is None
    assert "NFKC" in caplog.text
    check(codec, draw_texts(300, seed=3))
    check_decoding(codec)


def test_one_that_gives_other_tokens_is_not_used(
    plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = FastTokenizer.from_json_str(trained(None, ignore_merges=False).backend_tokenizer.to_str())

    class Wrong:
        def from_json_str(self, _: str) -> FastTokenizer:
            return other

    monkeypatch.setattr(text_codec, "FastTokenizer", Wrong())
    codec = settle(TextCodec(plain))
    assert codec._fast is None
    assert "other tokens" in caplog.text
    check(codec, draw_texts(300, seed=4))


def test_one_that_gives_other_texts_is_not_used(
    plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = FastTokenizer.from_json_str(plain.backend_tokenizer.to_str())

    class Wrong:
        encode_batch = tokenizer.encode_batch

        def from_json_str(self, _: str) -> "Wrong":
            return self

        def decode_batch(self, token_ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
            return [text + "!" for text in tokenizer.decode_batch(token_ids, skip_special_tokens)]

    monkeypatch.setattr(text_codec, "FastTokenizer", Wrong())
    codec = settle(TextCodec(plain))
    assert codec._fast is None
    assert "other tokens or texts" in caplog.text


def test_a_decoder_of_another_kind_stays() -> None:
    tokenizer = trained(None, ignore_merges=False)
    tokenizer.backend_tokenizer.decoder = None  # then there are spaces between tokens
    codec = settle(TextCodec(tokenizer))
    assert codec._fast is not None
    check(codec, draw_texts(300, seed=5))
    assert codec.decode([[70, 71, 72]], True) == [tokenizer.backend_tokenizer.decode([70, 71, 72])]
    assert codec._fast.decode([70, 71, 72], True) != tokenizer.backend_tokenizer.decode([70, 71, 72])


def test_it_must_agree_on_enough_text(plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_codec, "TRIAL", 1000)
    codec = TextCodec(plain)
    codec.encode(["enough to make one"])
    assert codec._candidate is not None
    codec._candidate.result(timeout=60)
    for _ in range(2):
        assert codec._fast is None
        codec.encode(["a" * 500])
    assert codec._fast is not None


def test_few_texts_are_not_worth_another_tokenizer(plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_codec, "ENOUGH", 10_000)
    codec = TextCodec(plain)
    check(codec, ["a text"] * 100)
    assert codec._candidate is None


def test_tokens_added_later_count(smollm2: Path) -> None:
    codec = settle(TextCodec(AutoTokenizer.from_pretrained(smollm2)))
    assert codec._fast is not None
    codec.tokenizer.add_tokens(["<later>"])
    (token_ids,) = codec.encode(["now <later>"])
    assert token_ids[-1] == codec.tokenizer.convert_tokens_to_ids("<later>")


def test_many_texts_in_their_order(plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_codec, "TEXTS_AT_ONCE", 7)
    texts = [f"text {number}" for number in range(50)]
    codec = TextCodec(plain)
    for _ in range(2):
        assert codec.encode(texts) == plain(texts)["input_ids"]
        settle(codec)
    assert codec.encode([]) == []
