"""What tokenizers lose is found, whatever their kind; what they only write another way is not taken for lost."""

import string
from typing import Any

import pytest
from tiny import word_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stableedit_pl.demo import demo_path
from stableedit_pl.model.encoding import Encoder, EncodingError
from stableedit_pl.model.lost_text import LostText

MARK = "\u2581"
LETTERS = [*string.ascii_letters, *string.digits, *".,;:!?'\"()-$%&/ "]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def lost(tokenizer: Any, text: str, finder: LostText | None = None) -> str | None:
    return (finder or LostText(tokenizer)).of(text, tokenizer(text)["input_ids"])


def fast(core: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def vocabulary(*tokens: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def byte_level(letters: list[str], normalizer: Any = None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(vocabulary("<end>", *letters), merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder, core.normalizer = decoders.ByteLevel(), normalizer
    return fast(core, bos_token="<end>", eos_token="<end>", unk_token="<end>")


def byte_fallback(missing: int = -1) -> PreTrainedTokenizerFast:
    """As Llama-2's: pieces over the word mark, and bytes for what is none."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256) if byte != missing]
    core = Tokenizer(
        models.BPE(vocabulary("<unk>", *pieces, MARK, "a", "b"), [], unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    core.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()])
    return fast(core, unk_token="<unk>")


def letters_only(normalizer: Any = None) -> PreTrainedTokenizerFast:
    """A letter a token, and no unknown token: others vanish."""
    core = Tokenizer(models.BPE(vocabulary(*LETTERS), merges=[]))
    core.normalizer = normalizer
    return fast(core)


def uncased() -> PreTrainedTokenizerFast:
    """As BERT's: small letters without accents, words cut into pieces."""
    pieces = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), *".,'!?-"]
    core = Tokenizer(models.WordPiece(vocabulary("[UNK]", "[CLS]", *pieces), unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return fast(core, unk_token="[UNK]", cls_token="[CLS]")


def unigram() -> PreTrainedTokenizerFast:
    scores = [("<unk>", 0.0), (MARK, -2.0), *((letter, -3.0) for letter in string.ascii_letters + ".")]
    core = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(r" {2,}", " ")])
    core.pre_tokenizer = core.decoder = None  # type: ignore[assignment]
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    core.decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="always")
    return fast(core, unk_token="<unk>")


ORDINARY = [
    "The capital of Kazakhstan is Astana.",
    " Astana",
    "  two  spaces, and a tab\tand a line\n",
    "\u00a0no-break\u3000wide\u200bnone\ufeff",
]
FOREIGN = ["北京", "กรุงเทพ", "Привет", "caf\u00e9", "cafe\u0301", "🙂", "❤\ufe0f", "\x00", "½", "<end>"]


@pytest.mark.parametrize("text", [*ORDINARY, *FOREIGN])
@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(BYTES), byte_level(BYTES, normalizers.NFC()), byte_fallback()],
    ids=["byte_level", "composing", "fallback"],
)
def test_a_tokenizer_with_all_bytes_loses_nothing(tokenizer: Any, text: str) -> None:
    assert lost(tokenizer, text) is None


@pytest.mark.parametrize("text", ORDINARY)
@pytest.mark.parametrize("make", [letters_only, uncased, unigram])
def test_ordinary_text_is_not_refused(make: Any, text: str) -> None:
    plain = text.replace("-", "") if make is unigram else text
    assert lost(make(), plain.replace(",", "")) is None


DEMO = str(demo_path("model"))


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        ("北京", "北 京"),
        ("a 北 b 北", "北"),
        ("Praha č. 1", "č"),
        ("🙂 yes", "🙂"),
        ("naïve", "ï"),
        ("\u0e17\u0e35\u0e48", "\u0e17\u0e35\u0e48"),
        ("❤\ufe0f", "❤\ufe0f"),
    ],
)
def test_characters_that_are_dropped(text: str, gone: str) -> None:
    assert lost(letters_only(), text) == gone


def test_added_tokens_need_no_letters() -> None:
    tokenizer = letters_only()
    tokenizer.add_tokens(["<|北|>"])
    assert lost(tokenizer, "a <|北|> b") is None and lost(tokenizer, "a 北 b") == "北"


def test_characters_of_which_only_some_bytes_have_tokens() -> None:
    """The demo's tokenizer was trained on plain English, and has a token for hardly any other byte."""
    some = byte_level([letter for letter in BYTES if letter != "\u00ac"])  # a byte of 京, none of 北
    assert lost(some, "北京 is Beijing") == "京"
    assert lost(some, "北 is north") is None
    assert lost(AutoTokenizer.from_pretrained(DEMO), " 北京") == "北 京"
    assert lost(byte_fallback(missing=0xAC), "a 京 b") == "京"


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFD(), None])
def test_letters_written_another_way_are_not_lost(normalizer: Any) -> None:
    stripped = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    for text in ("Café", "Cafe\u0301", "ÅNGSTRÖM"):
        assert lost(letters_only(stripped), text) is None
    assert lost(letters_only(normalizer), "Cafe") is None
    assert lost(letters_only(normalizer), "Café") is not None  # here the accent has no token, and nobody took it off


@pytest.mark.parametrize(
    ("make", "text", "gone"),
    [
        (word_tokenizer, "w1 Oslo w2 Rome", "Oslo Rome"),
        (word_tokenizer, "w1 <unk>", None),  # the text itself says so
        (uncased, "Crème brûlée!", None),
        (uncased, "in 北京", "北 京"),
        (uncased, "x1", "x1"),
        (unigram, "ab北京cd", "北京"),
        (unigram, "\ufb01ne \uff11", "\uff11"),  # made two letters, and a digit that has no token
    ],
)
def test_what_the_unknown_token_stands_for(make: Any, text: str, gone: str | None) -> None:
    assert lost(make(), text) == gone


def test_what_was_kept_once_does_not_hide_what_is_lost_later() -> None:
    for tokenizer, good, bad in (
        (letters_only(), "abc", "abcč"),
        (uncased(), "abc x", "abc1"),
        (unigram(), "ab", "až"),
    ):
        finder = LostText(tokenizer)
        assert lost(tokenizer, good, finder) is None
        assert lost(tokenizer, bad, finder) is not None
        assert lost(tokenizer, good, finder) is None


class Slow:
    """The least of a tokenizer without offsets: small letters, and signs it knows; nothing for others."""

    is_fast, unk_token_id = False, 0
    known = " abcdefghijklmnopqrstuvwxyz.?"

    def __call__(self, text: str) -> dict[str, Any]:
        return {"input_ids": [self.known.find(letter) + 1 for letter in text.lower()]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(self.known[i - 1] if i else "<unk>" for i in ids)


@pytest.mark.parametrize(
    ("text", "gone"), [("Where is Oslo?", None), ("Oslo 北", "北"), ("so 🙂", "🙂"), ("a\u200bb", None)]
)
def test_a_tokenizer_without_offsets_is_asked_by_decoding(text: str, gone: str | None) -> None:
    assert lost(Slow(), text) == gone


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("prompt", "target", "blamed"), [("the 北 is", "north", "prompt"), ("north is", "北", "target")]
)
def test_encoding_refuses_it_saying_what_was_lost(together: bool, prompt: str, target: str, blamed: str) -> None:
    encoder = Encoder(letters_only())
    text = {"prompt": prompt, "target": target}[blamed]
    said = f"the {blamed} '{text}' does not survive this tokenizer, which has no token for '北'"
    if together:
        assert str(encoder.refusals([(prompt, target)])[0]).startswith(said)
    else:
        with pytest.raises(EncodingError, match=said):
            encoder.encode(prompt, target)
