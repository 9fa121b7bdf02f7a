"""Memory, time and cost of a recipe before a GPU is asked for. Reads files only: no torch."""
