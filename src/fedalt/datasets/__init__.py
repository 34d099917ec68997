"""Federations that fedalt makes itself."""
