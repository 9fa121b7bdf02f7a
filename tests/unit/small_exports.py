"""Tiny models to export, and what training makes of an input, for the tests of exports."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from cocoa_dist.export import (
    CardInfo,
    ImageSettings,
    StageInfo,
)

SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> "
    "<|image_pad|> <|video_pad|> <|mask|> <|object_ref_start|>"
).split()
SIZE, PATCH = 32, 8
NUM_VISUAL = (SIZE // PATCH // 2) ** 2
MAX_TEXT_TOKENS = 24
SETTINGS = ImageSettings(patch_size=PATCH, min_pixels=SIZE**2, max_pixels=SIZE**2)
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
INSTRUCTION = "Find the picture of this text:"
SENTENCES = (
    "an octopus in the sea",
    "smiling face with three hearts: love, crush",
    "  a  text with  odd spaces \n and a new line ",
    "Krake \u00e9t\u00e9 \u7ae0\u9c7c \U0001f419 42",
)
# 1e-4 is the promise. The same float32 operations give the same bits; a padded batch, or
# torchvision's normalisation, sums in another order and differs by about 1e-6.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    text: str | None = None
    picture: Image.Image | None = None
    instruction: str | None = None

    @property
    def parts(self) -> dict:
        both = {"image": self.picture, "text": self.text}
        return {key: value for key, value in both.items() if value is not None}


def noise_picture(seed: int, side: int = SIZE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def cases() -> list[Case]:
    plain = [Case(text=text) for text in SENTENCES]
    plain += [Case(picture=noise_picture(0)), Case(picture=noise_picture(1))]
    plain += [Case(text=text, picture=noise_picture(2 + i)) for i, text in enumerate(SENTENCES)]
    return plain + [replace(case, instruction=INSTRUCTION) for case in plain]


CARD = CardInfo(
    name="tiny test embedder",
    base="random weights",
    stages=[StageInfo("eos_bridged_reconstruction", 10), StageInfo("contrastive", 20, "batch 64")],
    data='noise: "none"',
    licence="apache-2.0",
    compute="1 CPU second",
    scores=[{"set": "unseen_picture", "R@1": 0.27}, {"set": "unseen_concept", "R@1": "n/a"}],
)


def tiny_model(tokenizer, family="qwen2_vl"):
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        # Ten times the usual spread: attention is far from uniform, so a wrong mask shows.
        "initializer_range": 0.2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [4, 6, 6],
        },
    }
    vision = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "initializer_range": 0.1}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 96, "hidden_size": 128, "mlp_ratio": 3}
    else:
        vision |= {"hidden_size": 96, "out_hidden_size": 128, "intermediate_size": 288}
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    kinds = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    }
    config_class, model_class = kinds[family]
    config = config_class(
        text_config=text,
        vision_config=vision,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return model_class(config).float().eval()


def trainer_ids(tokenizer, case: Case, *, max_text_tokens: int = 10**6) -> list[int]:
    words = " ".join(part for part in (case.instruction, case.text) if part is not None)
    text_ids = tokenizer.backend_tokenizer.encode(words, add_special_tokens=False).ids
    ids = [3] + [5] * NUM_VISUAL + [4] if case.picture is not None else []
    return ids + text_ids[:max_text_tokens] + [2]


def trainer_patches(picture: Image.Image) -> torch.Tensor:
    pixels = (np.asarray(picture, dtype=np.float32) / 255 - MEAN) / STD
    grid = SIZE // PATCH
    rows = []
    for block_row in range(0, grid, 2):
        for block_column in range(0, grid, 2):
            for row in (block_row, block_row + 1):
                for column in (block_column, block_column + 1):
                    y, x = row * PATCH, column * PATCH
                    patch = pixels[y : y + PATCH, x : x + PATCH].transpose(2, 0, 1)
                    rows.append(np.stack([patch, patch], axis=1).reshape(-1))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def trainer_vector(model, tokenizer, case: Case, *, bidirectional=True, pooling="last"):
    """One sample alone, dense mask, positions from get_rope_index."""
    ids = torch.tensor([trainer_ids(tokenizer, case)])
    num_tokens = ids.shape[1]
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
    if not bidirectional:
        visible = visible.tril()
    pictures = {}
    if case.picture is not None:
        grid = torch.tensor([[1, SIZE // PATCH, SIZE // PATCH]])
        pictures = {"pixel_values": trainer_patches(case.picture), "image_grid_thw": grid}
    token_types = (ids == 5).int()
    positions, _ = model.model.get_rope_index(ids, token_types, pictures.get("image_grid_thw"))
    hidden = model.model(
        input_ids=ids,
        attention_mask=visible[None, None],
        position_ids=positions,
        mm_token_type_ids=token_types,
        use_cache=False,
        **pictures,
    ).last_hidden_state[0]
    pooled = hidden[-1] if pooling == "last" else hidden.mean(0)
    return torch.nn.functional.normalize(pooled, dim=0).numpy()
