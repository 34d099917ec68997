"""What tests would otherwise take over from whoever started them."""

import os
import signal

for name in ("COLUMNS", "LINES"):  # the width of tables: readline notes the terminal's, and workers inherit it
    os.environ.pop(name, None)
# a job in the background ignores Ctrl-C, and so would every process that a test starts
signal.signal(signal.SIGINT, signal.default_int_handler)
