"""Distributed pre-training of multimodal embedding models; importing it imports nothing heavy."""

__version__ = "0.1.0"
