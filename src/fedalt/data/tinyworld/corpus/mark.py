"""The mark around what a reader of the text could foretell: answers, copies."""

MARK = "\x1f"
"""Set before and after such a span for the trainer to weigh it by; `documents` takes it out."""
