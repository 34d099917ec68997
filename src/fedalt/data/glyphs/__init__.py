"""A tiny vision transformer that knows letters and no digit; ``python -m fedalt.data.glyphs --out DIR`` makes it."""
