"""Scores: the rules by hand, the model's answers by hand, and the means over prompts and edits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_gpt2, tiny_llama, word_tokenizer

from stableedit_pl.data.record_encoding import EncodedRecord
from stableedit_pl.data.records import EditRecord
from stableedit_pl.model.asking import Answer, Scorer, greedy
from stableedit_pl.model.encoding import IGNORED, Encoder, Encoding
from stableedit_pl.model.partial_forward import PartialForward
from stableedit_pl.model.scoring import KINDS, EditScores, RecordAnswers, answer_records, match, score_records

TOKENIZER = word_tokenizer()
ENCODE = Encoder(TOKENIZER).encode
PROMPTS = ["w1", "w2 w3", "w4 w5 w6", "w7 w8", "w9 w10 w11 w12 w13", "w14", "w15 w16"]
TARGETS = ["w20 w21", "w22", "w23 w24 w25", "w26", "w27", "w28 w29 w30 w31", "w32 w33"]
ENCODINGS = [ENCODE(prompt, target) for prompt, target in zip(PROMPTS, TARGETS, strict=True)]
RULES = ["token_match", "exact_match", "greedy_match"]


@pytest.fixture(scope="module", params=[tiny_llama, tiny_gpt2])
def model(request: pytest.FixtureRequest) -> Any:
    model = request.param()
    model.generation_config.eos_token_id = None  # random models end at once otherwise; tested on its own below
    return model


def by_hand(model: Any, encoding: Encoding) -> list[int]:
    """First choices at the answer tokens, one encoding at a time, no padding."""
    with torch.no_grad():
        logits = model(torch.tensor([encoding.input_ids])).logits[0]
    return [int(logits[i].argmax()) for i, label in enumerate(encoding.labels) if label != IGNORED]


def greedy_by_hand(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


# ---- rules


@pytest.mark.parametrize(
    ("answer", "expected", "scores"),
    [
        ((1, 2, 3), (1, 2, 3), (1.0, 1.0, 1.0)),
        ((1, 9, 3), (1, 2, 3), (2 / 3, 0.0, 0.0)),
        ((2, 3, 1), (1, 2, 3), (0.0, 0.0, 0.0)),  # the right tokens in the wrong places
        ((7,), (8,), (0.0, 0.0, 0.0)),
        ((1, 2, 3, 9), (1, 2, 3, 4), (0.75, 0.0, 0.0)),
    ],
)
def test_the_rules(answer: tuple[int, ...], expected: tuple[int, ...], scores: tuple[float, ...]) -> None:
    assert tuple(match(answer, expected, rule) for rule in RULES) == scores  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("answer", [(), (1,), (1, 2, 3)])
def test_answers_of_another_length_are_refused(rule: Any, answer: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"an answer of {len(answer)} tokens compared with one of 2"):
        match(answer, (1, 2), rule)


# ---- answers


def test_teacher_forced_answers_are_those_of_one_at_a_time(model: Any) -> None:
    answers = Scorer(PartialForward(model), "token_match", 3, 0).answers(ENCODINGS)
    assert [list(answer.tokens) for answer in answers] == [by_hand(model, encoding) for encoding in ENCODINGS]


def test_teacher_forced_losses_are_sums_over_answer_tokens(model: Any) -> None:
    answers = Scorer(PartialForward(model), "exact_match", 3, 0).answers(ENCODINGS)
    for encoding, answer in zip(ENCODINGS, answers, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([encoding.input_ids])).logits[0].log_softmax(dim=-1)
        expected = -sum(log_p[i, label].item() for i, label in enumerate(encoding.labels) if label != IGNORED)
        assert answer.loss == pytest.approx(expected, rel=1e-4)


def test_greedy_answers_are_those_of_a_loop(model: Any) -> None:
    answers = Scorer(PartialForward(model), "greedy_match", 3, 0).answers(ENCODINGS)
    for encoding, answer in zip(ENCODINGS, answers, strict=True):
        prompt = list(encoding.input_ids[: encoding.prompt_length])
        assert list(answer.tokens) == greedy_by_hand(model, prompt, len(encoding.target_ids))
        assert answer.loss != answer.loss  # NaN: there is no target to have a loss on


def test_free_decoding_differs_from_teacher_forcing(model: Any) -> None:
    """Negative control: the two ways of asking must not be one."""
    forced = Scorer(PartialForward(model), "exact_match", 3, 0).answers(ENCODINGS)
    decoded = Scorer(PartialForward(model), "greedy_match", 3, 0).answers(ENCODINGS)
    assert [a.tokens[0] for a in forced] == [a.tokens[0] for a in decoded]  # the first token has the prompt alone
    assert [a.tokens for a in forced] != [a.tokens for a in decoded]


@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=10, deadline=None)
@given(size=st.integers(1, 8), pad=st.sampled_from([0, 2, 63]), order=st.permutations(range(len(ENCODINGS))))
def test_batch_size_padding_and_order_do_not_matter(
    model: Any, rule: Any, size: int, pad: int, order: list[int]
) -> None:
    alone = Scorer(PartialForward(model), rule, 1, 0).answers(ENCODINGS)
    together = Scorer(PartialForward(model), rule, size, pad).answers([ENCODINGS[i] for i in order])
    assert [answer.tokens for answer in together] == [alone[i].tokens for i in order]
    if rule != "greedy_match":
        assert [a.loss for a in together] == pytest.approx([alone[i].loss for i in order], rel=1e-5)


def test_an_answer_that_ends_early_is_wrong_but_no_error() -> None:
    model = tiny_llama()
    prompt = [1, 5, 6]
    first, second = greedy_by_hand(model, prompt, 2)
    model.generation_config.eos_token_id = first  # the first token it writes ends the answer
    target = (first, second, 9)
    ending = Encoding((*prompt, *target[:-1]), (IGNORED, IGNORED, *target), 3)
    going_on = Encoding((1, 7, 8, 9), (IGNORED, IGNORED, 9, 10), 3)
    answers = Scorer(PartialForward(model), "greedy_match", 4, 0).answers([ending, going_on])
    assert answers[0].tokens == (first, 0, 0)
    assert match(answers[0].tokens, tuple(ending.target_ids), "greedy_match") == 0.0
    assert len(answers[1].tokens) == 2


def test_a_short_target_beside_a_long_one_of_the_same_prompt_length_gets_its_own_length() -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    encodings = [ENCODE("w1 w2", "w3"), ENCODE("w4 w5", "w6 w7 w8 w9")]
    answers = Scorer(PartialForward(model), "greedy_match", 2, 0).answers(encodings)
    assert [len(answer.tokens) for answer in answers] == [1, 4]


@pytest.mark.parametrize(
    "setting",
    [
        {"do_sample": True, "temperature": 5.0},
        {"num_beams": 3},
        pytest.param(
            {"repetition_penalty": 5.0},
        ),
        pytest.param(
            {"no_repeat_ngram_size": 1},
        ),
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_greedy_is_greedy_whatever_the_model_was_shipped_with(setting: dict[str, Any]) -> None:
    """Qwen2.5-Instruct, for one, is shipped with a repetition penalty."""
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    for prompt in ([1, 5, 6, 7], [1, 9, 9, 9], [1, 30, 31]):
        assert greedy(model, torch.tensor([prompt]), 6, 0)[0].tolist() == greedy_by_hand(model, prompt, 6)


@pytest.mark.parametrize("rule", RULES)
def test_asking_builds_no_graph_and_changes_nothing(model: Any, rule: Any) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    Scorer(PartialForward(model), rule, 3, 0).answers(ENCODINGS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("rule", RULES)
def test_no_prompts_have_no_answers(model: Any, rule: Any) -> None:
    assert Scorer(PartialForward(model), rule, 3, 0).answers([]) == []


# ---- records


def scored_record(rephrases: int = 0, locality: int = 0) -> EncodedRecord:
    def some(count: int, start: int) -> tuple[Encoding, ...]:
        return tuple(ENCODE(f"w{start + i} w1", f"w{40 + i} w2") for i in range(count))

    return EncodedRecord(ENCODE("w1", "w40 w2"), some(rephrases, 10), some(locality, 20), EditRecord("e", "p", "t"))


def test_answers_come_back_to_their_prompts() -> None:
    model = tiny_llama()
    records = [scored_record(2, 1), scored_record(), scored_record(0, 3)]
    answers = answer_records(Scorer(PartialForward(model), "token_match", 2, 0), records)
    for record, given_answers in zip(records, answers, strict=True):
        assert list(given_answers.efficacy.tokens) == by_hand(model, record.efficacy)
        for kind in ("generalization", "specificity"):
            got = [list(answer.tokens) for answer in getattr(given_answers, kind)]
            assert got == [by_hand(model, encoding) for encoding in getattr(record, kind)]


def right(encoding: Encoding) -> Answer:
    return Answer(tuple(encoding.target_ids))


def half(encoding: Encoding) -> Answer:
    return Answer((encoding.target_ids[0], 0))


def test_scores_of_an_edit_are_means_over_its_prompts_of_a_kind() -> None:
    record = scored_record(2, 4)
    answers = RecordAnswers(
        half(record.efficacy),
        (right(record.generalization[0]), half(record.generalization[1])),
        (*map(right, record.specificity[:3]), half(record.specificity[3])),
    )
    assert score_records([record], [answers], "token_match", None) == [(0.5, 0.75, 0.875)]
    assert score_records([record], [answers], "exact_match", None) == [(0.0, 0.5, 0.75)]


def test_kinds_that_an_edit_has_no_prompts_of_have_no_score() -> None:
    record = scored_record()
    answers = RecordAnswers(right(record.efficacy), (), ())
    assert score_records([record], [answers], "token_match", None) == [(1.0, None, None)]
    assert score_records([record], [answers], "token_match", [answers]) == [(1.0, None, None)]


def test_specificity_is_agreement_with_the_base_where_there_is_one() -> None:
    record = scored_record(1, 1)
    wrong = Answer((0, 0))
    answers = RecordAnswers(wrong, (wrong,), (wrong,))
    base = RecordAnswers(wrong, (wrong,), (wrong,))
    # Only specificity is held against the base: agreeing with it on the edit itself is no success.
    assert score_records([record], [answers], "token_match", [base]) == [(0.0, 0.0, 1.0)]
    assert score_records([record], [answers], "token_match", None) == [(0.0, 0.0, 0.0)]
    other = RecordAnswers(right(record.efficacy), (wrong,), (Answer((0, 7)),))
    assert score_records([record], [answers], "token_match", [other]) == [(0.0, 0.0, 0.5)]


def test_records_and_answers_must_be_as_many() -> None:
    with pytest.raises(ValueError):
        score_records([scored_record()], [], "token_match", None)


# ---- the metric

SCORE = st.none() | st.floats(0, 1)


@given(triples=st.lists(st.tuples(st.floats(0, 1), SCORE, SCORE), max_size=12), cut=st.integers(0, 12))
def test_the_metric_is_the_mean_over_edits_that_have_a_score(triples: Any, cut: int) -> None:
    metric = EditScores()
    metric.update(triples[:cut])
    metric.update(triples[cut:])
    got = metric.compute()
    assert tuple(got) == KINDS
    for kind, column in zip(KINDS, zip(*triples, strict=True) if triples else [()] * 3, strict=True):
        values = [value for value in column if value is not None]
        assert got[kind] == (pytest.approx(sum(values) / len(values)) if values else None)


def test_the_mean_is_over_edits_not_over_prompts() -> None:
    many, one = scored_record(4), scored_record(1)
    wrong = Answer((0, 0))
    answers = [
        RecordAnswers(wrong, tuple(map(right, many.generalization)), ()),
        RecordAnswers(wrong, (wrong,), ()),
    ]
    metric = EditScores()
    metric.update(score_records([many, one], answers, "token_match", None))
    assert metric.compute() == {"efficacy": 0.0, "generalization": 0.5, "specificity": None}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_the_metric_starts_over_after_a_reset() -> None:
    metric = EditScores()
    metric.update([(1.0, None, 0.0)])
    metric.reset()
    assert metric.compute() == dict.fromkeys(KINDS)
    metric.update([(0.25, 1.0, None)])
    assert metric.compute() == {"efficacy": 0.25, "generalization": 1.0, "specificity": None}


def test_a_zero_is_a_score_and_none_is_not() -> None:
    metric = EditScores()
    metric.update([(1.0, 0.0, None), (0.0, None, None)])
    assert metric.compute() == {"efficacy": 0.5, "generalization": 0.0, "specificity": None}
