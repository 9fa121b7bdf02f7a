"""Objectives: what a stage minimises, as named sums with their counts."""
