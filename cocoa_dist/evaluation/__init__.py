"""Evaluation by MMEB's protocol: a scorer without torch, the table of sets, embedding with a cache.

`scores`, `sets` and `vector_files` need numpy alone; what loads a model imports it when it runs.
"""

from cocoa_dist.evaluation.scores import SetScore, SetVectors, score_set, summarise
from cocoa_dist.evaluation.sets import SetInfo, mmeb_sets, read_sets
from cocoa_dist.evaluation.vector_files import read_vectors, vector_files, write_vectors

__all__ = [
    "SetInfo",
    "SetScore",
    "SetVectors",
    "mmeb_sets",
    "read_sets",
    "read_vectors",
    "score_set",
    "summarise",
    "vector_files",
    "write_vectors",
]
