"""A child process of test_step_counts.py: counts the cases, made worse on request."""

import sys
from pathlib import Path

import torch.nn.functional as F
from rank_jobs import do_jobs

from cocoa_dist import distributed
from cocoa_dist.model.embedder import EmbeddingModel

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from step_cases import CASES, GRAPHS, count_case, count_graphs

ROWS = 256


def run(job: dict, world: distributed.World) -> dict[str, int]:
    if job["name"] == GRAPHS:
        return count_graphs()
    spoil = {"": lambda: None, "logits": all_logits, "padding": padded_rows}[job["spoilt"]]
    spoil()
    case = next(case for case in CASES if case.name == job["case"])
    return count_case(case, rank=world.rank)


def all_logits() -> None:
    """Logits of as many rows again, which no loss reads."""
    from transformers import Qwen2VLForConditionalGeneration

    forward, head_of = EmbeddingModel.forward, Qwen2VLForConditionalGeneration.get_output_embeddings

    def spoilt(self, batch):
        def twice(rows_SD):
            return head_of(self.backbone)(F.pad(rows_SD, (0, 0, 0, len(rows_SD))))[: len(rows_SD)]

        self.backbone.get_output_embeddings = lambda: twice
        try:
            return forward(self, batch)
        finally:
            del self.backbone.get_output_embeddings

    EmbeddingModel.forward = spoilt


def padded_rows() -> None:
    """Rows up to the next multiple of 256 go through every text layer's large products."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2MLP

    forward = Qwen2MLP.forward

    def padded(self, hidden_1TD):
        rows = hidden_1TD.shape[1]
        return forward(self, F.pad(hidden_1TD, (0, 0, 0, -rows % ROWS)))[:, :rows]

    Qwen2MLP.forward = padded


if __name__ == "__main__":
    do_jobs(*sys.argv[1:], run)
