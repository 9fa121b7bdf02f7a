"""The small files of an exported folder: chat template and JSON configs, as pure functions.

They make stock classes (PaddleOCRVLProcessor, sentence-transformers' Transformer, Pooling,
Normalize) reproduce the token ids of training. Nothing here reads a model or writes a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Pooling = Literal["last", "mean", "compression", "late_interaction"]

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
VISION_START_TOKEN = "<|vision_start|>"
VISION_END_TOKEN = "<|vision_end|>"

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

POOLING_MODES: Mapping[str, str] = {"last": "lasttoken", "mean": "mean", "compression": "mean"}
POOLINGS = (*POOLING_MODES, "late_interaction")  # the last keeps several vectors: no pooling
SEVERAL_VECTORS = "MultiVectorEncoder"  # of sentence-transformers, for late interaction

# Pictures first, then every text part joined by one space: sentence-transformers puts the
# instruction in a system message before the user's, so it lands in front of the text. EOS is not
# written here: the tokenizer appends it, and so leaves room for it when it truncates.
CHAT_TEMPLATE = (
    "{%- set ns = namespace(text='') -%}\n"
    "{%- for message in messages -%}\n"
    "{%- if message['content'] is string -%}\n"
    "{%- set parts = [{'type': 'text', 'text': message['content']}] -%}\n"
    "{%- else -%}\n"
    "{%- set parts = message['content'] -%}\n"
    "{%- endif -%}\n"
    "{%- for part in parts -%}\n"
    "{%- if part['type'] == 'image' -%}\n"
    f"{{{{- '{VISION_START_TOKEN}{IMAGE_TOKEN}{VISION_END_TOKEN}' -}}}}\n"
    "{%- elif part['type'] == 'text' and part['text'] -%}\n"
    "{%- set ns.text = ns.text + ' ' + part['text'] if ns.text else part['text'] -%}\n"
    "{%- endif -%}\n"
    "{%- endfor -%}\n"
    "{%- endfor -%}\n"
    "{{- ns.text -}}\n"
)


_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
_NORMALIZE = "sentence_transformers.base.modules.normalize.Normalize"
# One folder's self-test, run in one release of most versions: 5.1 ignores text_config.is_causal;
# 5.2 and 5.3 honour it only in batches with padding (without any they build no mask, and SDPA falls
# back on the layer's own is_causal, which is true). 5.4 to 5.17 load no image processor without
# torchvision; with it, 5.9 to 5.12 do not find the text model's weights and only warn of that.
# 5.18 to 5.23 pass without torchvision.
MINIMUM_TRANSFORMERS = "5.18"
WEIGHTS_FOLDER = "1_Weights"
MASK_FOLDER = "1_Mask"


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes patches: Qwen2-VL's image processor with these numbers."""

    patch_size: int  # pixels: 14 in the released models
    min_pixels: int  # area in pixels, after resizing
    max_pixels: int  # area in pixels, after resizing
    merge_size: int = 2  # patches a side that become one visual token
    temporal_patch_size: int = 2  # a still picture is repeated this often
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if min(self.patch_size, self.merge_size, self.temporal_patch_size) < 1:
            raise ValueError(
                f"image settings: sizes must be at least 1, got patch_size {self.patch_size}, "
                f"merge_size {self.merge_size}, temporal_patch_size {self.temporal_patch_size}"
            )
        if not self.factor**2 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"image settings: need {self.factor**2} (one visual token) <= min_pixels <= "
                f"max_pixels, got min_pixels {self.min_pixels}, max_pixels {self.max_pixels}"
            )

    @property
    def factor(self) -> int:
        """Side in pixels of what one visual token covers."""
        return self.patch_size * self.merge_size

    @property
    def max_tokens(self) -> int:
        """Visual tokens of a picture of max_pixels (very long, thin pictures may have more)."""
        return self.max_pixels // self.factor**2


def processor_config(settings: ImageSettings) -> dict[str, Any]:
    """processor_config.json: a stock processor of image processor + tokenizer and no video part.

    Qwen2VLProcessor insists on a video processor, which imports torchvision. PaddleOCRVLProcessor
    expands one placeholder to prod(image_grid_thw) / merge_size^2 in the same way, gives
    mm_token_type_ids, and needs only Pillow.
    """
    return {
        "processor_class": "PaddleOCRVLProcessor",
        "image_processor": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "resample": 3,  # bicubic
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(settings.mean),
            "image_std": list(settings.std),
            "patch_size": settings.patch_size,
            "temporal_patch_size": settings.temporal_patch_size,
            "merge_size": settings.merge_size,
            "size": {
                "shortest_edge": settings.min_pixels,
                "longest_edge": settings.max_pixels,
            },
        },
    }


def append_bridge(tokenizer_json: Mapping[str, Any], bridge: Mapping[str, int]) -> dict[str, Any]:
    """tokenizer.json with a post-processor that ends texts on the bridge, and no fixed lengths.

    `bridge`: tokens and their ids, in order; EOS, or compression tokens. The tokenizer subtracts
    what the post-processor adds before it truncates: the bridge is never cut. Replaces the
    post-processor there was; the caller has checked that it adds nothing but EOS.
    """
    pieces = [{"SpecialToken": {"id": token, "type_id": 0}} for token in bridge]
    processor = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, *pieces],
        "pair": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 0}},
            *pieces,
        ],
        "special_tokens": {
            token: {"id": token, "ids": [token_id], "tokens": [token]}
            for token, token_id in bridge.items()
        },
    }
    return {**tokenizer_json, "truncation": None, "padding": None, "post_processor": processor}


def tokenizer_config(saved: Mapping[str, Any], *, max_length: int) -> dict[str, Any]:
    """tokenizer_config.json with the token names the processor asks for; pads on the right.

    max_length counts all tokens of an input: visual ones, text and EOS.
    """
    dropped = {"is_local", "local_files_only", "name_or_path", "chat_template", "auto_map"}
    named = {
        "image_token": IMAGE_TOKEN,
        "video_token": VIDEO_TOKEN,
        "vision_bos_token": VISION_START_TOKEN,
        "vision_eos_token": VISION_END_TOKEN,
    }
    return {
        **{key: value for key, value in saved.items() if key not in dropped},
        "extra_special_tokens": named,
        "model_max_length": max_length,
        "padding_side": "right",
        "truncation_side": "right",
        "processor_class": "PaddleOCRVLProcessor",
    }


def modules_config(pooling: Pooling) -> list[dict[str, Any]]:
    """modules.json: transformer, pooling, normalisation, all classes of sentence-transformers.

    A mean over compression tokens alone is a mean in which every other token weighs nothing. Where
    they are vectors of their own, all other tokens are left out.
    """
    if pooling == "late_interaction":
        mask = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask"
        return _numbered(
            {
                "": _TRANSFORMER,
                MASK_FOLDER: f"{mask}.MultiVectorMask",
                "2_Normalize": _NORMALIZE,
            }
        )
    weights = "sentence_transformers.sentence_transformer.modules.word_weights.WordWeights"
    types = {
        "": _TRANSFORMER,
        **({WEIGHTS_FOLDER: weights} if pooling == "compression" else {}),
        "1_Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "2_Normalize": _NORMALIZE,
    }
    return _numbered(types)


def _numbered(types: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return modules in order, from folder and class of each."""
    return [
        {"idx": index, "name": str(index), "path": path, "type": type_}
        for index, (path, type_) in enumerate(types.items())
    ]


def mask_config(vocabulary: Mapping[str, int], bridge: Mapping[str, int]) -> dict[str, Any]:
    """config.json of MultiVectorMask: all tokens but those of the bridge are left out.

    By its list of what to skip: that of what to keep is for documents alone.
    """
    words = sorted(vocabulary.keys() - bridge.keys(), key=lambda token: vocabulary[token])
    return {"skiplist_words": words, "skiplist_tasks": ["query", "document"]}


def token_weights_config(
    vocabulary: Mapping[str, int], bridge: Mapping[str, int]
) -> dict[str, Any]:
    """config.json of WordWeights: 1 for the tokens of the bridge, 0 for all others."""
    tokens = [""] * (1 + max(vocabulary.values()))
    for token, token_id in vocabulary.items():
        tokens[token_id] = token
    return {"vocab": tokens, "word_weights": dict.fromkeys(bridge, 1.0), "unknown_word_weight": 0.0}


def transformer_config() -> dict[str, Any]:
    """sentence_bert_config.json: every input becomes a message and goes through the template."""
    route = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": route,
            "image": route,
            "image+text": route,
            "message": {**route, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
    }


def pooling_config(pooling: Pooling, *, width: int) -> dict[str, Any]:
    """1_Pooling/config.json. The instruction's tokens are part of a mean, as in training."""
    return {
        "embedding_dimension": width,
        "pooling_mode": POOLING_MODES[pooling],
        "include_prompt": True,
    }


def normalize_config(pooling: Pooling) -> dict[str, Any]:
    """2_Normalize/config.json: of the pooled vector, or of each of several."""
    return {"module_input_name": "token_embeddings"} if pooling == "late_interaction" else {}


def sentence_transformers_config(
    prompts: Mapping[str, str], *, pooling: Pooling = "last"
) -> dict[str, Any]:
    """config_sentence_transformers.json. Raises ValueError on a prompt with spaces at an end."""
    for name, prompt in prompts.items():
        if prompt != prompt.strip():
            raise ValueError(
                f"prompts[{name!r}] is {prompt!r}: remove the white space at its ends, "
                "the chat template puts one space between instruction and text"
            )
    several = pooling == "late_interaction"
    return {
        "model_type": SEVERAL_VECTORS if several else "SentenceTransformer",
        "prompts": dict(prompts),
        "default_prompt_name": None,
        "similarity_fn_name": "meanmaxsim" if several else "cosine",
    }
