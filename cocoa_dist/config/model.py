"""The fields of a recipe that say which model is trained, and which tokens it gets."""

from typing import Literal

from pydantic import model_validator

from cocoa_dist.config.fields import NotNegative, Positive, Strict


class RandomModelConfig(Strict):
    """A model with random weights, for the quickstart's backbone and for tests."""

    family: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] = "qwen2_vl"
    hidden_size: Positive = 128
    num_layers: Positive = 2
    num_heads: Positive = 4
    num_key_value_heads: Positive = 2
    intermediate_size: Positive = 352
    vision_width: Positive = 96
    vision_layers: Positive = 2
    vision_heads: Positive = 4
    patch_size: Positive = 8


class ModelConfig(Strict):
    """The backbone: a Hugging Face folder, or random weights of a given shape."""

    path: str | None = None  # a Hugging Face folder, or `asset:NAME`
    random: RandomModelConfig | None = None
    tokenizer: str | None = None  # folder; default: the same as `path`
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention_backend: Literal[
        "auto", "dense", "split", "varlen", "flash_attn", "flash_attn_4", "flex"
    ] = "auto"
    bridge_token: str = "<|im_end|>"  # EOS: the embedding is read from it
    mask_token: str = "<|mask|>"  # added to the tokenizer where it has none
    new_tokens: tuple[str, ...] = ()  # added likewise; new rows are trained in adapter stages too
    compression_tokens: NotNegative = 0  # learnt tokens that are the bridge in place of EOS (CoMa)
    num_bridge_tokens: Positive = 1  # EOS, and learnt tokens behind it
    checkpoint_activations: bool = False
    compile_layers: bool = False  # torch.compile of decoder layers and vision blocks

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.random is None):
            raise ValueError("give exactly one of `path` and `random`")
        if self.random is not None and self.tokenizer is None:
            raise ValueError("`random` weights need a `tokenizer`")
        return self

    @property
    def num_learnt_tokens(self) -> int:
        """Tokens whose embeddings are a parameter of their own, the same in all stages."""
        return self.compression_tokens or self.num_bridge_tokens - 1

    @property
    def bridge_length(self) -> int:
        """Tokens of a bridge: learnt ones alone, or EOS with learnt ones behind it."""
        return self.compression_tokens or self.num_bridge_tokens

    @model_validator(mode="after")
    def _one_bridge(self) -> "ModelConfig":
        if self.compression_tokens and self.num_bridge_tokens > 1:
            raise ValueError(
                f"compression_tokens is {self.compression_tokens} and num_bridge_tokens "
                f"{self.num_bridge_tokens}: the bridge is either learnt tokens alone, or EOS with "
                "learnt ones behind it; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _new_tokens_differ(self) -> "ModelConfig":
        twice = sorted({token for token in self.new_tokens if self.new_tokens.count(token) > 1})
        if twice or "" in self.new_tokens:
            raise ValueError(
                f"new_tokens has {', '.join(twice) + ' twice' if twice else 'an empty token'}; "
                "expected tokens that differ from each other"
            )
        return self
