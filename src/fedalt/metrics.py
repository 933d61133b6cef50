"""How a generated text compares with its reference."""

from collections.abc import Sequence
from statistics import fmean


def text_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Exact match in [0, 1] after trimming, and ROUGE-1 and ROUGE-L F, stemmed, times 100.

    Means over all pairs; none for no pairs.
    """
    if not references:
        return {}
    # Through NLTK it imports scikit-learn and pandas: two seconds, for those who generate texts.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    pairs = list(zip(predictions, references, strict=True))
    rouge = [scorer.score(reference, prediction) for prediction, reference in pairs]
    return {
        "exact_match": fmean(float(a.strip() == b.strip()) for a, b in pairs),
        "rouge1": 100 * fmean(score["rouge1"].fmeasure for score in rouge),
        "rougeL": 100 * fmean(score["rougeL"].fmeasure for score in rouge),
    }
