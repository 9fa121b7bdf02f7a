"""Segment attention: a plan compiled once per pack, and kernels that all give its numbers."""

from cocoa_dist.attention.kernels import available_backends, segment_attention
from cocoa_dist.attention.plan import AttentionPlan, compile_plan

__all__ = ["AttentionPlan", "available_backends", "compile_plan", "segment_attention"]
