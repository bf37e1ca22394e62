"""Text to tokens: which positions predict the target, for each family of tokenizers."""

from typing import Any, ClassVar

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, word_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stableedit_pl.model.encoding import IGNORED, Encoder, Encoding, EncodingError, chunks, collate

TOKENIZER = word_tokenizer()
MARK = "\u2581"


def ids(*tokens: str) -> list[int]:
    return [TOKENIZER.convert_tokens_to_ids(token) for token in tokens]


def piece_tokenizer(vocabulary: list[str]) -> PreTrainedTokenizerFast:
    """Pieces over sentencepiece's word mark, which is put before every text, as Llama-2's tokenizer."""
    scores = [(token, 0.0 if token.startswith("<") else -1.0 - 0.01 * i) for i, token in enumerate(vocabulary)]
    core = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    core.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


PIECES = ["<unk>", "<s>", "</s>", MARK, f"{MARK}Paris", f"{MARK}is", "Paris", "is", MARK * 2]


@pytest.fixture(scope="module")
def splitting() -> PreTrainedTokenizerFast:
    """A space and "Paris" become a bare mark before the word: one mark for the space, one for the text's beginning."""
    return piece_tokenizer(PIECES)


@pytest.fixture(scope="module")
def metaspace() -> PreTrainedTokenizerFast:
    """The newer spelling of the same: a mark is put before a text only if none is there."""
    tokenizer = piece_tokenizer(PIECES)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme="always")
    return tokenizer


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level pieces, as GPT-2's and Llama-3's: a space is the letter that stands for its byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<end>", *alphabet, "\u0120P", "\u0120Pa"])}
    core = Tokenizer(models.BPE(vocabulary, merges=[("\u0120", "P"), ("\u0120P", "a")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<end>", eos_token="<end>")


def tokens(tokenizer: Any, encoding: Encoding) -> tuple[list[str], list[str]]:
    """Inputs, and the answer tokens."""
    return tokenizer.convert_ids_to_tokens(encoding.input_ids), tokenizer.convert_ids_to_tokens(encoding.target_ids)


# ---- labels


def test_labels_stand_where_the_next_token_is_the_targets() -> None:
    encoding = Encoder(TOKENIZER).encode("w1 w2", "w20 w21 w22")
    assert list(encoding.input_ids) == ids("<s>", "w1", "w2", "w20", "w21")  # the last target token is never read
    assert list(encoding.labels) == [IGNORED, IGNORED, *ids("w20", "w21", "w22")]
    assert encoding.prompt_length == 3 and encoding.target_ids == ids("w20", "w21", "w22")


def test_a_target_of_one_token_is_predicted_by_the_prompts_last() -> None:
    encoding = Encoder(TOKENIZER).encode("w1", "w20")
    assert list(encoding.input_ids) == ids("<s>", "w1") and list(encoding.labels) == [IGNORED, *ids("w20")]


WORD_LISTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(prompt=WORD_LISTS, target=WORD_LISTS)
def test_any_prompt_and_target_match_the_reference(prompt: str, target: str) -> None:
    encoding = Encoder(TOKENIZER).encode(prompt, target)
    assert (list(encoding.input_ids), list(encoding.labels)) == ref.encode(TOKENIZER, prompt, target)
    whole = ids("<s>", *prompt.split(), *target.split())
    assert list(encoding.input_ids) == whole[:-1] and encoding.prompt_length == 1 + len(prompt.split())


def test_the_target_gets_no_special_tokens() -> None:
    encoding = Encoder(TOKENIZER).encode("w1", "w2")
    assert list(encoding.input_ids).count(TOKENIZER.bos_token_id) == 1


def test_an_end_token_that_the_tokenizer_adds_does_not_stand_between_prompt_and_target() -> None:
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert tokenizer("w1")["input_ids"][-1] == tokenizer.eos_token_id
    encoding = Encoder(tokenizer).encode("w1 w2", "w20 w21")
    assert list(encoding.input_ids) == ids("<s>", "w1", "w2", "w20")


# ---- tokenizer families


def test_a_bare_word_mark_is_read_but_not_scored(splitting: Any) -> None:
    encoding = Encoder(splitting).encode("Paris is", "Paris")
    assert tokens(splitting, encoding) == (["<s>", f"{MARK}Paris", f"{MARK}is", MARK], [f"{MARK}Paris"])
    assert encoding.labels[encoding.prompt_length - 1] == IGNORED
    assert (list(encoding.input_ids), list(encoding.labels)) == ref.encode(splitting, "Paris is", "Paris")


def test_parity_counts_the_bare_word_mark(splitting: Any) -> None:
    encoding = Encoder(splitting, count_bare_space=True).encode("Paris is", "Paris")
    assert tokens(splitting, encoding)[1] == [MARK, f"{MARK}Paris"]
    expected = ref.encode(splitting, "Paris is", "Paris", skip_bare_space=False)
    assert (list(encoding.input_ids), list(encoding.labels)) == expected


def test_a_target_that_is_nothing_but_word_marks_is_refused_unless_counted(splitting: Any) -> None:
    for target in ("", " ", "   "):
        with pytest.raises(EncodingError, match="tokenizes to nothing that could be scored"):
            Encoder(splitting).encode("Paris is", target)
    assert Encoder(splitting, count_bare_space=True).encode("Paris is", " ").target_ids


def test_double_spaces_are_bare_too(splitting: Any) -> None:
    """ " " + " Paris": two marks in one piece, and a word."""
    read, scored = tokens(splitting, Encoder(splitting).encode("is", " Paris"))
    assert "".join(read[2:]) == MARK * 2 and scored == [f"{MARK}Paris"]


def test_a_tokenizer_that_adds_no_second_mark_has_no_bare_one(metaspace: Any) -> None:
    for counted in (True, False):
        encoding = Encoder(metaspace, count_bare_space=counted).encode("Paris is", "Paris")
        assert tokens(metaspace, encoding) == (["<s>", f"{MARK}Paris", f"{MARK}is"], [f"{MARK}Paris"])


def test_a_space_after_the_target_is_bare_too(splitting: Any) -> None:
    encoding = Encoder(splitting).encode("is", "Paris ")
    assert tokens(splitting, encoding)[1] == [f"{MARK}Paris"] and encoding.labels[-1] == IGNORED
    assert (list(encoding.input_ids), list(encoding.labels)) == ref.encode(splitting, "is", "Paris ")


def test_a_mark_between_words_is_part_of_its_word(splitting: Any) -> None:
    assert tokens(splitting, Encoder(splitting).encode("is", "Paris is"))[1] == [f"{MARK}Paris", f"{MARK}is"]


def test_a_byte_level_space_is_a_token_like_others(byte_level: Any) -> None:
    encoding = Encoder(byte_level).encode("a", "b")
    assert tokens(byte_level, encoding) == (["a", "\u0120"], ["\u0120", "b"])
    assert tokens(byte_level, Encoder(byte_level).encode("a", "Pat"))[1] == ["\u0120Pa", "t"]
    assert tokens(byte_level, Encoder(byte_level).encode("a", " b"))[1] == ["\u0120", "\u0120", "b"]


def test_a_prompt_that_ends_in_a_begin_token_keeps_it(byte_level: Any) -> None:
    """GPT-2's begin and end are one token; one that somebody wrote is not the tokenizer's to drop."""
    encoding = Encoder(byte_level).encode("a<end>", "b")
    assert tokens(byte_level, encoding)[0] == ["a", "<end>", "\u0120"]


# ---- refusals


@pytest.mark.parametrize("target", ["", " ", "\n"])
def test_an_empty_target_is_refused(target: str) -> None:
    with pytest.raises(EncodingError, match=r"the target .* tokenizes to nothing"):
        Encoder(TOKENIZER).encode("w1", target)


def test_an_empty_prompt_is_refused_where_nothing_comes_before_the_target(byte_level: Any) -> None:
    with pytest.raises(EncodingError, match="the prompt '' tokenizes to nothing, so no position predicts the target"):
        Encoder(byte_level).encode("", "b")
    assert Encoder(TOKENIZER).encode("", "w1").prompt_length == 1  # here there is a begin token to predict from


def test_what_does_not_fit_the_context_is_refused_and_what_just_fits_is_taken() -> None:
    encoder = Encoder(TOKENIZER, context_length=5)
    assert len(encoder.encode("w1 w2", "w3 w4 w5").input_ids) == 5
    with pytest.raises(EncodingError, match="prompt and target need 6 tokens, but the model's context is 5"):
        encoder.encode("w1 w2", "w3 w4 w5 w6")
    assert len(Encoder(TOKENIZER, None).encode("w1 " * 500, "w2").input_ids) == 501


# ---- many at a time


class SlowTokenizer:
    """The least of a tokenizer written in Python: special tokens around a text's words, none around nothing."""

    bos_token_id, eos_token_id, pad_token_id, unk_token_id, is_fast = 1, 2, None, None, False

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(TEXTS)  # nothing is lost

    def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
        words = [3 + len(word) for word in text.split()]
        return {"input_ids": [1, *words, 2] if add_special_tokens and words else words}

    def convert_ids_to_tokens(self, token: int) -> str:
        return MARK if token == 3 + 9 else f"piece {token}"


TEXTS = [
    "",
    " ",
    "\n",
    "a",
    "Paris",
    "is Paris",
    "Paris is is",
    "a b c d e f",
    "w1 w2 w3",
    "ninechars",
    "a<end>",
    "</s>",
]


@pytest.mark.parametrize("count_bare_space", [True, False])
@pytest.mark.parametrize("kind", ["words", "ended", "splitting", "metaspace", "byte_level", "slow"])
def test_refusals_are_those_of_encode(kind: str, count_bare_space: bool, request: pytest.FixtureRequest) -> None:
    """Every prompt with every target, all in one call, with each of them more than once."""
    ended = word_tokenizer()
    ended.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    own = {"words": TOKENIZER, "ended": ended, "slow": SlowTokenizer()}
    encoder = Encoder(own.get(kind) or request.getfixturevalue(kind), 4, count_bare_space)
    pairs = [(prompt, target) for prompt in TEXTS for target in TEXTS]
    expected: list[str | None] = []
    for prompt, target in pairs:
        try:
            encoder.encode(prompt, target)
            expected.append(None)
        except EncodingError as error:
            expected.append(str(error))
    assert encoder.refusals(pairs) == expected
    assert None in expected and any(said and "context is 4" in said for said in expected)
    assert encoder.refusals([]) == []


def test_a_text_that_recurs_is_tokenized_once() -> None:
    class Counts(SlowTokenizer):
        texts: ClassVar[list[str]] = []

        def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, Any]:
            if isinstance(text, str):
                self.texts.append(text)
            return super().__call__(text, add_special_tokens)

    assert Encoder(Counts()).refusals([("a b", "c"), ("a b", "d"), ("e", "c")]) == [None] * 3
    assert Counts.texts == ["a b", "e", " c", " d"]


# ---- batches


def test_padding_is_on_the_right_and_masked() -> None:
    encoder = Encoder(TOKENIZER)
    batch = collate([encoder.encode("w1 w2 w3", "w4 w5"), encoder.encode("w1", "w2")], 99)
    assert batch.input_ids.tolist() == [ids("<s>", "w1", "w2", "w3", "w4"), [*ids("<s>", "w1"), 99, 99, 99]]
    assert batch.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED] * 3 + ids("w4", "w5"), [IGNORED, *ids("w2"), *[IGNORED] * 3]]
    assert batch.answers.tolist() == [[False, False, False, True, True], [False, True, False, False, False]]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {torch.int64}


def test_a_pad_id_that_is_also_a_token_stays_visible_where_it_is_one() -> None:
    encoder = Encoder(TOKENIZER)
    batch = collate([encoder.encode("w1 w1", "w1"), encoder.encode("w1", "w1")], ids("w1")[0])
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]] and batch.answers.sum().item() == 2


@pytest.mark.parametrize(
    ("special", "expected"),
    [({"pad_token": "<pad>", "eos_token": "</s>"}, 0), ({"eos_token": "</s>"}, 2), ({}, 0)],
)
def test_the_pad_id_falls_back_to_the_end_token_and_then_to_any(special: dict[str, str], expected: int) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, **special)
    assert Encoder(bare).pad_id == expected


@given(items=st.lists(st.integers(), max_size=20), size=st.integers(1, 7))
def test_chunks_drop_nothing(items: list[int], size: int) -> None:
    pieces = list(chunks(iter(items), size))
    assert [item for piece in pieces for item in piece] == items
    assert all(len(piece) == size for piece in pieces[:-1]) and all(0 < len(piece) <= size for piece in pieces)


# ---- ids that the model has no embedding for


def test_tokens_beyond_the_models_embeddings_are_refused_naming_them() -> None:
    last = len(WORDS) + 3
    encoder = Encoder(TOKENIZER, vocabulary=last)
    encoder.encode("w1", "w2")
    for prompt, target, blamed in (("w1 w59", "w2", "prompt"), ("w1", "w3 w59", "target")):
        with pytest.raises(EncodingError, match=rf"the {blamed} .* token 'w59' with id {last}, .* ids 0..{last - 1}"):
            encoder.encode(prompt, target)
    assert [said is None for said in encoder.refusals([("w1", "w2"), ("w59", "w2"), ("w1", "w59")])] == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize(("vocabulary", "expected"), [(None, 63), (64, 63), (63, 2), (2, 0)])
def test_padding_never_needs_an_id_that_the_model_has_not(vocabulary: int | None, expected: int) -> None:
    grown = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer, pad_token="w59", eos_token="</s>", unk_token="<unk>"
    )
    assert grown.pad_token_id == 63
    assert Encoder(grown, vocabulary=vocabulary).pad_id == expected
