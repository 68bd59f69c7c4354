"""The engine: numba loops, and the thin layer that calls them."""
