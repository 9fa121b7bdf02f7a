"""README.md of an exported folder: the model card, built from plain values.

States what the model is, where it comes from and how to use it; measures and checks nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cocoa_dist.export.templates import (
    IMAGE_TOKEN,
    MINIMUM_TRANSFORMERS,
    SEVERAL_VECTORS,
    ImageSettings,
    Pooling,
)


@dataclass(frozen=True)
class StageInfo:
    """One training stage, in the order it ran."""

    name: str
    steps: int  # optimizer steps
    note: str = ""  # anything worth a table cell: samples, learning rate, attention rule


@dataclass(frozen=True)
class CardInfo:
    """What people ask about a model. Texts are Markdown and are printed as given."""

    name: str
    base: str  # the model training started from
    stages: Sequence[StageInfo]
    data: str
    licence: str  # an identifier such as apache-2.0
    compute: str
    scores: Sequence[Mapping[str, str | float]] = field(default_factory=tuple)  # rows of one table
    warnings: Sequence[str] = ()  # what a reader has to know first

    def __post_init__(self) -> None:
        for row in self.scores:
            if list(row) != list(self.scores[0]):
                raise ValueError(
                    f"card scores: a row has the columns {list(row)}, the first row has "
                    f"{list(self.scores[0])}: give every row the same columns in the same order"
                )


@dataclass(frozen=True)
class CardFacts:
    """What the exporter knows about the folder and the card has to say."""

    model_type: str
    width: int  # of a vector
    bidirectional: bool
    pooling: Pooling
    image_settings: ImageSettings
    prompts: Mapping[str, str]
    max_text_tokens: int | None
    resize_difference: float | None  # of vectors, see selftest.resize_difference; None: not known
    bridge: tuple[str, ...] = ("EOS",)  # the tokens that end every input

    @property
    def ending(self) -> str:
        """What ends every input, in words."""
        return "EOS" if len(self.bridge) == 1 else f"the {len(self.bridge)} tokens behind it"


def model_card(info: CardInfo, facts: CardFacts) -> str:
    """Return the whole README.md."""
    become = f"vectors of {facts.width} numbers (L2 norm 1) that are compared by cosine."
    if facts.pooling == "late_interaction":
        become = (
            f"{len(facts.bridge)} vectors each, of {facts.width} numbers (L2 norm 1), that are "
            "compared by late interaction: the mean, over the vectors of what is looked for, of "
            "each one's best cosine."
        )
    sections = [
        _front_matter(info, facts),
        f"# {info.name}\n\nText, pictures, and pictures with text become {become}",
        *(f"> **Note.** {text}" for text in info.warnings),
        _usage(facts),
        _instructions(facts),
        _plain_usage(facts),
        _requirements(facts),
        _lineage(info),
        _details(facts),
        _serving(facts),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(info: CardInfo, facts: CardFacts) -> str:
    # A JSON string is a YAML string: quoting needs no rules of our own.
    return "\n".join(
        [
            "---",
            "library_name: sentence-transformers",
            "pipeline_tag: sentence-similarity",
            f"license: {json.dumps(info.licence)}",
            f"base_model: {json.dumps(info.base)}",
            f"tags: [sentence-transformers, feature-extraction, multimodal, {facts.model_type}]",
            "---",
        ]
    )


def _usage(facts: CardFacts) -> str:
    kind, needs = "SentenceTransformer", "`sentence-transformers`"
    if facts.pooling == "late_interaction":
        kind, needs = SEVERAL_VECTORS, "`sentence-transformers` >= 6.2 (`MultiVectorEncoder`)"
    return f"""## Use

Needs {needs} and `pillow`; no torchvision, no `trust_remote_code`.

```python
from PIL import Image
from sentence_transformers import {kind}
model = {kind}("path/to/this/folder")
both = {{"text": "an octopus", "image": Image.open("picture.png")}}
vectors = model.encode([{{"text": "an octopus"}}, {{"image": both["image"]}}, both])
```

A bare string or picture works too, but a string that names an existing picture file, or is the
URL of a picture, is read as that picture: `{{"text": ...}}` is always text. Transparent pictures
are put over white. `{IMAGE_TOKEN}` is reserved and refused in texts.{_truncation(facts)}"""


def _truncation(facts: CardFacts) -> str:
    if facts.max_text_tokens is None:
        return ""
    limit = facts.max_text_tokens
    longest = limit + len(facts.bridge)
    return f"""

Training cut texts (with their instruction) at {limit} tokens, {facts.ending} not counted.
Here one limit counts visual tokens too, so a text beside a smaller picture, or alone, may keep up
to {facts.image_settings.max_tokens + 2} tokens more. For texts alone,
`encode(texts, processing_kwargs={{"text": {{"max_length": {longest}}}}})` cuts exactly as
training did. Only the text is ever cut, never {facts.ending}."""


def _instructions(facts: CardFacts) -> str:
    prompts = "\n".join(f"- `{name}`: {json.dumps(text)}" for name, text in facts.prompts.items())
    listed = f"\n\nNamed prompts of this model:\n\n{prompts}" if prompts else ""
    return f"""## Instructions

Pass the instruction as `prompt=` (or `prompt_name=`), without a space at its end:
`model.encode([...], prompt="Find the picture of this text:")`. The model then reads the picture,
the instruction, one space, the text, and {facts.ending}. A system message with the
instruction before the user's message gives the same tokens. Do not put it in front of the
text by hand when a picture is given with it as well.{listed}"""


def _plain_usage(facts: CardFacts) -> str:
    if facts.pooling == "last":
        pool = "hidden[torch.arange(len(hidden)), batch.attention_mask.sum(1) - 1]"
    elif facts.pooling == "compression":
        pool = f"torch.stack([one[-{len(facts.bridge)}:].mean(0) for one in unpadded])"
    elif facts.pooling == "late_interaction":
        pool = f"torch.stack([one[-{len(facts.bridge)}:] for one in unpadded])"
    else:
        pool = "(hidden * (w := batch.attention_mask[..., None])).sum(1) / w.sum(1)"
    unpadded = ""
    if facts.pooling in ("compression", "late_interaction"):
        unpadded = (
            "    unpadded = [one[keep.bool()] for one, keep in zip(hidden, batch.attention_mask)]\n"
        )
    return f"""## Use with transformers alone

```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained("path/to/this/folder")
model = AutoModel.from_pretrained("path/to/this/folder").eval()
picture = Image.open("picture.png")
content = [{{"type": "image", "image": picture}}, {{"type": "text", "text": "an octopus"}}]
messages = [[{{"role": "user", "content": content}}]]
batch = processor.apply_chat_template(
    messages,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={{"padding": True, "truncation": True}},
)
with torch.no_grad():
    hidden = model(**batch, use_cache=False).last_hidden_state
{unpadded}    vectors = torch.nn.functional.normalize({pool}, dim=-1)
```

`AutoTokenizer` alone serves texts: it appends {facts.ending} itself. Pad on the right
(the default here)."""


def _requirements(facts: CardFacts) -> str:
    direction = (
        "in both directions (`text_config.is_causal: false`)" if facts.bidirectional else "causally"
    )
    return f"""## Requirements

- transformers >= {MINIMUM_TRANSFORMERS}. Older versions stop with an error (no torchvision), miss
  weights with only a warning (5.9 to 5.12), or run a bidirectional model causally: 5.1 always, 5.2
  and 5.3 **without a word** for every batch without padding. If in doubt, check `selftest.json`.
- The text model attends {direction}.
- vLLM and sglang were **not tried**, see the last section.

`selftest.json` lists inputs (`text`, `image`: a file of this folder, `instruction`) and their
vectors from training; every value should agree within 1e-4 in float32."""


def _lineage(info: CardInfo) -> str:
    stages = [
        {"stage": stage.name, "steps": stage.steps, "note": stage.note} for stage in info.stages
    ]
    scores = f"## Scores\n\n{_table(info.scores)}" if info.scores else "## Scores\n\nNone given."
    return f"""## Training

Started from: {info.base}

{_table(stages)}

- Data: {info.data}
- Compute: {info.compute}
- Licence: {info.licence}

{scores}"""


def _details(facts: CardFacts) -> str:
    settings = facts.image_settings
    last = "EOS" if len(facts.bridge) == 1 else facts.bridge[-1]
    pooling = {
        "last": f"last token ({last})",
        "mean": "mean over all tokens",
        "compression": f"mean over the last {len(facts.bridge)} tokens, `{facts.bridge[0]}` to "
        f"`{facts.bridge[-1]}`, by WordWeights",
        "late_interaction": f"none; the last {len(facts.bridge)} tokens, `{facts.bridge[0]}` to "
        f"`{facts.bridge[-1]}`, are the vectors, by MultiVectorMask",
    }[facts.pooling]
    resizing = (
        "not measured for this folder"
        if facts.resize_difference is None
        else f"at most {facts.resize_difference:.1e} in any number of a vector, on the self-test's "
        "pictures reduced to the model's size"
    )
    return f"""## Details

- Tokens: `[vision_start] + [image_pad] * n + [vision_end]` if there is a picture, then
  `instruction + " " + text`, then {facts.ending}; n is one token for
  {settings.factor} x {settings.factor} pixels.
- Pooling: {pooling}, then L2 normalisation.
- Pictures: {settings.min_pixels} to {settings.max_pixels} pixels after resizing, patches of
  {settings.patch_size} pixels.
- Training resized pictures with torch; Pillow's bicubic differs: {resizing}."""


def _serving(facts: CardFacts) -> str:
    pooling = {"last": "LAST", "mean": "MEAN"}.get(facts.pooling)
    if pooling is None:
        return """## vLLM and sglang

Neither pools the tokens of this model: use sentence-transformers."""
    causal = ""
    if facts.bidirectional:
        causal = (
            " The config's `is_causal: false` has to reach the text model inside the server; where "
            "it does not, vectors of long texts differ most."
        )
    return f"""## vLLM and sglang (untested)

Settings that follow from what this folder is; **nobody has run them**. Compare the server's vectors
with `selftest.json` before using them.{causal}

```
vllm serve FOLDER --runner pooling --convert embed \\
  --pooler-config '{{"pooling_type": "{pooling}"}}' --chat-template FOLDER/chat_template.jinja
python -m sglang.launch_server --model-path FOLDER --is-embedding \\
  --chat-template FOLDER/chat_template.jinja
```

Send inputs as messages (picture first), not as bare texts, and see that the tokenizer's own EOS is
the last token: servers that add no special tokens leave it out."""


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    """Markdown table of rows with the same columns."""
    if not rows:
        return "None given."
    cells = [list(rows[0]), ["---"] * len(rows[0])]
    cells += [[str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
