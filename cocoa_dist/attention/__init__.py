"""Segment attention: a plan compiled once per pack, and backends that all give its numbers."""

from cocoa_dist.attention.compile import compile_plan
from cocoa_dist.attention.kernels import (
    available_backends,
    choose_backend,
    segment_attention,
)
from cocoa_dist.attention.plan import AttentionPlan

__all__ = [
    "AttentionPlan",
    "available_backends",
    "choose_backend",
    "compile_plan",
    "segment_attention",
]
