"""One short file per method, and the registry."""
