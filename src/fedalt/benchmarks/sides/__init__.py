"""One short file per side: ``prepare(spec)`` builds everything, the ``Job`` it returns is what the clock sees."""
