"""How a generated text compares with its reference, in any script."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Final

_ASCII_WORD: Final = re.compile(r"[a-z0-9]+")
# Written without spaces between words: each character is a word, with the marks above and below it.
_WITHOUT_SPACES: Final = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x3005, 0x312F),  # Han marks, Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31FF),  # more of the last two
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA980, 0xA9FF),  # Javanese, more Burmese
    (0xAA60, 0xAADF),  # more Burmese, Tai Viet
    (0xF900, 0xFAFF),
    (0x1AFF0, 0x1B16F),  # more Hiragana and Katakana
    (0x20000, 0x3FFFF),
)

# Variation selectors, which choose a glyph, and the line that stretches an Arabic word.
_ORNAMENTS: Final = frozenset(map(chr, range(0xFE00, 0xFE10))) | {"\N{ARABIC TATWEEL}"}


def text_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match in [0, 1] and ROUGE-1 and ROUGE-L F, stemmed, times 100.

    Means over all pairs; none for no pairs. Exact match leaves aside spaces at both ends, case, and
    how Unicode composes an accent. A reference without a word, such as ":-)", has exact match times
    100 for its ROUGE. See `words` for what a word is.
    """
    if not references:
        return {}
    # Through NLTK it imports scikit-learn and pandas: two seconds, for those who generate texts.
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer = _Words()
    scorer = RougeScorer(["rouge1", "rougeL"], tokenizer=tokenizer)
    metrics: dict[str, list[float]] = {"exact_match": [], "rouge1": [], "rougeL": []}
    for prediction, reference in zip(predictions, references, strict=True):
        exact = float(_same_form(prediction) == _same_form(reference))
        metrics["exact_match"].append(exact)
        rouge = scorer.score(reference, prediction) if tokenizer.tokenize(reference) else {}
        for name in ("rouge1", "rougeL"):
            metrics[name].append(100 * (rouge[name].fmeasure if rouge else exact))
    return {name: fmean(values) for name, values in metrics.items()}


def words(text: str) -> list[str]:
    """The words of a text as ROUGE counts them, not stemmed.

    A word is a stretch of letters, numbers and the marks that belong to them, without case, in
    Unicode's form NFKC; of scripts that put no spaces between words it is one character with its
    marks. Of a text in ASCII these are the words of Google's `rouge_score`.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    # Symbols first: NFKC would make letters of some, such as the trade mark.
    kept = unicodedata.normalize("NFKC", "".join(map(_kept, text)))
    parts: list[str] = []
    before = ""  # what the last character has left open: a word, one character, or nothing
    for char in unicodedata.normalize("NFKC", kept.casefold()):
        kind = unicodedata.category(char)[0]
        if kind == "M" and before:
            parts[-1] += char
        elif kind not in "LN":
            before = ""
        elif _stands_alone(char):
            parts.append(char)
            before = "character"
        elif before == "word":
            parts[-1] += char
        else:
            parts.append(char)
            before = "word"
    return parts


def _kept(char: str) -> str:
    """A character of a word as it is, a space for what stands between words."""
    category = unicodedata.category(char)
    if category[0] in "LN" or category in ("Mn", "Mc"):
        return "" if char in _ORNAMENTS else char
    # Of what no one sees, such as a joiner within a Hindi word, only this one parts words.
    return "" if category in ("Cf", "Me") and char != "\N{ZERO WIDTH SPACE}" else " "


def _stands_alone(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in _WITHOUT_SPACES)


def _same_form(text: str) -> str:
    """Equal for texts that differ in case and in how accents are composed alone."""
    whole = unicodedata.normalize("NFC", text.strip()).casefold()
    return unicodedata.normalize("NFC", whole)


class _Words:
    """`words`, those of a to z stemmed by Google's own tokenizer: its stemmer is of English."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._of_ascii: Callable[[str], list[str]] = DefaultTokenizer(use_stemmer=True).tokenize

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        if text.isascii():
            return self._of_ascii(text)
        parts: list[str] = []
        for word in words(text):
            parts += self._of_ascii(word) if word.isascii() else [word]
        return parts
