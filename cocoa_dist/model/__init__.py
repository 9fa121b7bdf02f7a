"""The model: a transformers backbone whose attention runs plans, and the heads on top of it."""
