"""Rows: where they come from, prompts, tokens, batches."""
