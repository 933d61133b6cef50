"""What servings are worth on clients' examples, and what they write and weigh."""

from fedalt.core.settings import Scoring
from fedalt.evaluation.generation import generate
from fedalt.evaluation.group import embed
from fedalt.evaluation.likelihood import Scores
from fedalt.evaluation.scoring import in_groups, score, score_together

__all__ = ["Scores", "Scoring", "embed", "generate", "in_groups", "score", "score_together"]
