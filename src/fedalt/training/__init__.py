"""Local training of a cohort of clients."""
