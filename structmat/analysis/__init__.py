"""Costs, timings and pictures of structures and runs."""
