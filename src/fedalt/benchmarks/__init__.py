"""Alternating measurements of fedalt against other ways to do the same work: ``fedalt bench``."""
