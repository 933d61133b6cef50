"""ROUGE and exact match in every script; of English texts they are those of `rouge_score`."""

import random
import unicodedata

import pytest

from fedalt.metrics import text_metrics, words

RIGHT = {
    "Russian": "Париж — столица Франции.",
    "Greek": "Η Αθήνα είναι η πρωτεύουσα της Ελλάδας.",
    "Arabic": "باريس هي عاصمة فرنسا",
    "Persian": "می‌خواهم به خانه بروم",
    "Hebrew": "פריז היא בירת צרפת",
    "Hindi": "पेरिस फ़्रांस की राजधानी है",
    "Bengali": "প্যারিস ফ্রান্সের রাজধানী",
    "Tamil": "பாரிஸ் பிரான்சின் தலைநகரம்",
    "Chinese": "巴黎是法国的首都",
    "Japanese": "パリはフランスの首都です",
    "Thai": "ปารีสเป็นเมืองหลวงของฝรั่งเศส",
    "Khmer": "ប៉ារីសជារដ្ឋធានីនៃប្រទេសបារាំង",
    "Korean": "파리는 프랑스의 수도입니다",
    "Georgian": "პარიზი საფრანგეთის დედაქალაქია",
    "Vietnamese": "Thủ đô của nước Pháp là Paris",
    "Turkish": "İstanbul'un başkenti değil",
    "no letters": ":-)",
    "an emoji": "👍🏽",
}


@pytest.mark.parametrize("language", RIGHT)
def test_a_right_answer_has_all_of_rouge_and_a_wrong_one_nothing(language):
    right = RIGHT[language]
    assert text_metrics([right], [right]) == {"exact_match": 1, "rouge1": 100, "rougeL": 100}
    wrong = text_metrics(["entirely else"], [right])
    assert wrong == {"exact_match": 0, "rouge1": 0, "rougeL": 0}


@pytest.mark.parametrize("language", RIGHT)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_how_accents_are_composed_and_case_make_no_difference(language, form):
    right = RIGHT[language]
    other = unicodedata.normalize(form, right)
    assert text_metrics([other], [right]) == {"exact_match": 1, "rouge1": 100, "rougeL": 100}
    if language != "Turkish":  # whose capital I has a dot
        assert text_metrics([other.upper()], [right])["exact_match"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Paris is the capital_of France, isn't it?", "paris is the capital of france isn t it"),
        ("Столица: ПАРИЖ", "столица париж"),
        ("Ὀδυσσεύς ΟΔΟΣ", "ὀδυσσεύσ οδοσ"),
        ("राजधानी है", "राजधानी है"),
        ("ক্\u200dষ ক", "ক্ষ ক"),
        ("東京に2024年 Tokyo", "東 京 に 2024 年 tokyo"),
        ("ﾊﾟﾘ Ａ１", "パ リ a1"),
        ("กรุงเทพ", "ก รุ ง เ ท พ"),
        ("서울은 수도", "서울은 수도"),
        ("un café cafe\u0301", "un café café"),
        ("Straße STRASSE", "strasse strasse"),
        ("price: 5 € brand™", "price 5 brand"),
        ("كـــتاب", "كتاب"),
        ("ok 👍🏽 1\ufe0f\u20e3", "ok 1"),
    ],
)
def test_what_counts_as_a_word(text, expected):
    assert words(text) == [unicodedata.normalize("NFKC", each) for each in expected.split()]


def test_part_of_an_answer_has_part_of_rouge():
    half = text_metrics(["столица"], ["столица Франции"])
    assert half["rouge1"] == pytest.approx(200 / 3)
    signs = text_metrics(["首都は東京"], ["首都は京都"])  # 4 of 5 signs are there, in order 4
    assert signs["rouge1"] == pytest.approx(80)


def test_english_numbers_are_those_of_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    some = "running the RUNS Anna's well-known 3.5 % of_it U.S. cats, (ponies)! \n\t don't"
    draw = random.Random(0)
    for _ in range(200):
        a, b = (" ".join(draw.choices(some.split(" "), k=draw.randint(1, 9))) for _ in "ab")
        ours = text_metrics([a], [b])
        for name, score in theirs.score(b, a).items():
            if any(each.isalnum() for each in b):
                assert ours[name] == pytest.approx(100 * score.fmeasure)


def test_typographic_signs_of_english_make_no_difference_to_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    theirs = RougeScorer(["rougeL"], use_stemmer=True)
    a, b = "It’s “fine” — 5€… she’s running™", "It’s fine, she’s running • 5"
    assert text_metrics([a], [b])["rougeL"] == pytest.approx(
        100 * theirs.score(b, a)["rougeL"].fmeasure
    )
