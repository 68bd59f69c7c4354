"""Workloads: what L1 does to L0, drawn from mixes, replayed from executed runs, or recorded."""
