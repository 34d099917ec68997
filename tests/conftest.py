"""The width of tables is up to each test: readline notes the terminal's in the environment, and workers inherit it."""

import os

for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
