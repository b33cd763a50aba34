"""Timings side by side: `python -m bench`."""
