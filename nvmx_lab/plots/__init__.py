"""Plots: a tidy frame in, a figure and its alt text out."""
