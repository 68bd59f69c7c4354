"""Price lists per CPU generation, and pricing: cycles are counts times prices.

`prices` reads a price list and draws from it; `pricing` multiplies. Everything is in TSC cycles.
"""
