"""Several runs held against each other: methods, seeds, settings."""
