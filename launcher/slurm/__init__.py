"""Runs, submits and explains a run under SLURM."""
