"""Answers, metrics, scores."""
