"""A metric of all rows at once: the share of different words among all words of all answers."""

from fedalt.registry import METRICS


@METRICS.register("distinct", corpus=True, title="distinct words")
def distinct(answers, references):
    """100 times the number of different words over the number of words; 0 where there is none."""
    words = [word for answer in answers for word in answer.split()]
    return 100 * len(set(words)) / len(words) if words else 0.0
