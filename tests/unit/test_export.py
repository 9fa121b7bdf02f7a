"""The exported folder gives the tokens and vectors of training, through stock libraries alone."""

import copy
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_exports import (
    CARD,
    INSTRUCTION,
    MAX_TEXT_TOKENS,
    NUM_VISUAL,
    SENTENCES,
    SETTINGS,
    SIZE,
    SPECIAL,
    TOLERANCE,
    Case,
    cases,
    noise_picture,
    tiny_model,
    trainer_ids,
    trainer_vector,
)
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    Qwen2Tokenizer,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from cocoa_dist.export import (
    ImageSettings,
    SelfTestVector,
    check_self_test,
    export_folder,
)
from cocoa_dist.export.selftest import load_encoder


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*SENTENCES, INSTRUCTION] * 3, trainer)
    model = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        extra_special_tokens=SPECIAL,
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(tokenizer)


# ------------------------------------------------ what training does, written out once more here


def self_test(model, tokenizer, **how) -> list[SelfTestVector]:
    return [
        SelfTestVector(
            text=case.text,
            image=case.picture,
            instruction=case.instruction,
            vector=trainer_vector(model, tokenizer, case, **how),
        )
        for case in cases()
    ]


def export(model, tokenizer, destination: Path, **changes) -> Path:
    arguments = {
        "model": model,
        "tokenizer": tokenizer,
        "destination": destination,
        "image_settings": SETTINGS,
        "bidirectional": True,
        "pooling": "last",
        "prompts": {"query": INSTRUCTION},
        "card": CARD,
        "max_text_tokens": MAX_TEXT_TOKENS,
    } | changes
    if "self_test" not in arguments:
        arguments["self_test"] = self_test(model, tokenizer)
    export_folder(**arguments)
    return destination


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory) -> Path:
    return export(model, tokenizer, tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def encoder(folder):
    return load_encoder(folder)


# ------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{'+'.join(case.parts)}")
def test_exported_tokens_are_those_of_training(encoder, tokenizer, case):
    features = encoder[0].preprocess([case.parts], prompt=case.instruction)
    ids = features["input_ids"][0].tolist()
    assert ids == trainer_ids(tokenizer, case)
    assert features["mm_token_type_ids"][0].tolist() == [int(token == 5) for token in ids]


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_exported_tokens_of_a_padded_batch_are_those_of_training(encoder, tokenizer, instruction):
    batch = [case for case in cases() if case.instruction == instruction]
    features = encoder[0].preprocess([case.parts for case in batch], prompt=instruction)
    for row, mask, case in zip(
        features["input_ids"], features["attention_mask"], batch, strict=True
    ):
        expected = trainer_ids(tokenizer, case)
        assert row[: len(expected)].tolist() == expected
        assert mask.tolist() == [int(i < len(expected)) for i in range(len(row))]
        assert set(row[len(expected) :].tolist()) <= {tokenizer.pad_token_id}


@pytest.mark.parametrize("order", [("image", "text"), ("text", "image")])
def test_the_picture_comes_first_whatever_the_order_of_the_keys(encoder, tokenizer, order):
    case = Case(text="octopus", picture=noise_picture(0))
    parts = {key: case.parts[key] for key in order}
    ids = encoder[0].preprocess([parts])["input_ids"][0].tolist()
    assert ids == trainer_ids(tokenizer, case)


def test_instruction_in_a_system_message_equals_prompt(encoder, tokenizer):
    case = Case(text="octopus", picture=noise_picture(0), instruction=INSTRUCTION)
    messages = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": [{"type": "text", "text": "octopus"}]},
    ]
    messages[1]["content"].append({"type": "image", "image": case.picture})
    ids = encoder[0].preprocess([messages])["input_ids"][0].tolist()
    assert ids == trainer_ids(tokenizer, case)


def test_long_texts_are_cut_as_in_training_and_keep_eos(encoder, tokenizer):
    text = " ".join(SENTENCES * 3)
    limit = {"text": {"max_length": MAX_TEXT_TOKENS + 1}}
    exact = encoder[0].preprocess([text], processing_kwargs=limit)["input_ids"][0].tolist()
    assert exact == trainer_ids(tokenizer, Case(text=text), max_text_tokens=MAX_TEXT_TOKENS)
    # With a picture of the full number of visual tokens the default limit is the exact one.
    case = Case(text=text, picture=noise_picture(0), instruction=INSTRUCTION)
    both = encoder[0].preprocess([case.parts], prompt=INSTRUCTION)["input_ids"][0].tolist()
    assert both == trainer_ids(tokenizer, case, max_text_tokens=MAX_TEXT_TOKENS)
    alone = encoder[0].preprocess([text])["input_ids"][0].tolist()
    assert len(alone) == MAX_TEXT_TOKENS + 1 + NUM_VISUAL + 2
    assert alone[-1] == tokenizer.eos_token_id


def test_a_text_cannot_bring_its_own_image_tokens(encoder):
    with pytest.raises(ValueError, match="image_pad"):
        encoder.encode(["an <|image_pad|> octopus"])


# ------------------------------------------------------------------------------------- vectors


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_exported_vectors_are_those_of_training(model, tokenizer, tmp_path, bidirectional, pooling):
    how = {"bidirectional": bidirectional, "pooling": pooling}
    vectors = self_test(model, tokenizer, **how)
    path = export(model, tokenizer, tmp_path / "out", self_test=vectors, **how)
    report = check_self_test(path, tolerance=TOLERANCE)
    assert report.passed, report.describe()
    assert len(report.differences) == len(cases())


def test_qwen2_5_vl_exports_too(tokenizer, tmp_path):
    model = tiny_model(tokenizer, "qwen2_5_vl")
    path = export(model, tokenizer, tmp_path / "out")
    report = check_self_test(path, tolerance=TOLERANCE)
    assert report.passed, report.describe()


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_bare_inputs_in_one_padded_batch_give_the_same_vectors(
    encoder, model, tokenizer, instruction
):
    batch = [case for case in cases() if case.instruction == instruction]
    bare = [next(iter(c.parts.values())) if len(c.parts) == 1 else c.parts for c in batch]
    expected = np.stack([trainer_vector(model, tokenizer, case) for case in batch])
    named = {"prompt_name": "query"} if instruction else {}
    np.testing.assert_allclose(encoder.encode(bare, **named), expected, atol=TOLERANCE)


def test_transparent_pictures_are_put_over_white(encoder):
    rgba = noise_picture(0).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, rgba).convert("RGB")
    # One level of 255 may round the other way where the two libraries blend.
    np.testing.assert_allclose(encoder.encode([rgba]), encoder.encode([flat]), atol=2e-2)


def card_code(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_code_of_the_model_card_runs(model, tokenizer, tmp_path, pooling):
    vectors = self_test(model, tokenizer, pooling=pooling)
    folder = export(model, tokenizer, tmp_path / "out", pooling=pooling, self_test=vectors)
    case = Case(text="an octopus", picture=noise_picture(0))
    case.picture.save(tmp_path / "picture.png")
    expected = trainer_vector(model, tokenizer, case, pooling=pooling)
    for code in card_code(folder):
        code = code.replace("path/to/this/folder", str(folder))
        code = code.replace("picture.png", str(tmp_path / "picture.png"))
        names: dict = {}
        exec(code, names)
        np.testing.assert_allclose(np.asarray(names["vectors"])[-1], expected, atol=TOLERANCE)


def test_transformers_loads_model_tokenizer_and_image_processor_apart(folder, model, tokenizer):
    case = Case(text="an octopus", picture=noise_picture(0))
    pixels = AutoImageProcessor.from_pretrained(folder)([case.picture], return_tensors="pt")
    visual = "<|vision_start|>" + "<|image_pad|>" * NUM_VISUAL + "<|vision_end|>"
    ids = AutoTokenizer.from_pretrained(folder)(visual + case.text, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = (
            AutoModel.from_pretrained(folder)
            .eval()(input_ids=ids, mm_token_type_ids=(ids == 5).int(), **pixels)
            .last_hidden_state
        )
    found = torch.nn.functional.normalize(hidden[0, -1], dim=0).numpy()
    np.testing.assert_allclose(found, trainer_vector(model, tokenizer, case), atol=TOLERANCE)


# ---------------------------------------------------------------------- refusals and the folder


@pytest.mark.parametrize("wrong", [{"bidirectional": False}, {"pooling": "mean"}])
def test_a_folder_that_is_not_the_trained_model_is_not_left_behind(
    model, tokenizer, tmp_path, wrong
):
    with pytest.raises(ValueError, match="not the trained one"):
        export(model, tokenizer, tmp_path / "out", **wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompts": {"query": "Find: "}}, "white space"),
        ({"image_settings": ImageSettings(patch_size=14, min_pixels=784, max_pixels=784)}, "patch"),
        ({"self_test": []}, "self_test is empty"),
        ({"pooling": "first"}, "expected one of"),
        ({"max_text_tokens": 0}, "max_text_tokens is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, tokenizer, tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        export(model, tokenizer, tmp_path / "out", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_left_alone(model, tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="already exists"):
        export(model, tokenizer, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_tokenizer_of_another_model_is_refused(model, tokenizer, tmp_path):
    other = copy.deepcopy(tokenizer)
    other.add_tokens([f"<extra{i}>" for i in range(5)])
    with pytest.raises(ValueError, match="embeds only"):
        export(model, other, tmp_path / "out")


def test_the_tokenizer_of_an_exported_folder_exports_again(folder, model, tokenizer, tmp_path):
    again = AutoTokenizer.from_pretrained(folder)
    path = export(model, again, tmp_path / "out", self_test=self_test(model, tokenizer))
    assert AutoTokenizer.from_pretrained(path)("octopus").input_ids.count(2) == 1


def test_export_changes_neither_model_nor_tokenizer(model, tokenizer, tmp_path):
    config, backend = model.config.to_json_string(), tokenizer.backend_tokenizer.to_str()
    export(model, tokenizer, tmp_path / "out")
    assert model.config.to_json_string() == config
    assert tokenizer.backend_tokenizer.to_str() == backend


def test_only_the_text_config_says_that_attention_is_not_causal(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["text_config"]["is_causal"] is False
    assert "is_causal" not in config


def test_no_file_of_the_folder_asks_for_remote_code(folder):
    assert not list(folder.rglob("*.py"))
    assert all("auto_map" not in path.read_text() for path in folder.rglob("*.json"))


def test_large_self_test_pictures_are_stored_at_the_models_size(model, tokenizer, tmp_path):
    large = noise_picture(7, side=2 * SIZE)
    vector = trainer_vector(model, tokenizer, Case(text="octopus"))
    item = SelfTestVector(text=None, image=large, instruction=None, vector=vector)
    path = export(model, tokenizer, tmp_path / "out", self_test=[item], verify=False)
    (entry,) = json.loads((path / "selftest.json").read_text())
    with Image.open(path / entry["image"]) as stored:
        assert stored.size == (SIZE, SIZE)
        exact = trainer_vector(model, tokenizer, Case(picture=stored.convert("RGB")))
    entry["vector"] = exact.tolist()
    (path / "selftest.json").write_text(json.dumps([entry]))
    assert check_self_test(path, tolerance=TOLERANCE).passed


@pytest.fixture
def folder_copy(model, tokenizer, tmp_path) -> Path:
    return export(model, tokenizer, tmp_path / "copy", verify=False)


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_the_self_test_notices_one_wrong_number(folder_copy, value):
    entries = json.loads((folder_copy / "selftest.json").read_text())
    entries[3]["vector"][5] = value
    (folder_copy / "selftest.json").write_text(json.dumps(entries))
    report = check_self_test(folder_copy)
    assert not report.passed
    assert "1 of" in report.describe()
    assert "entry 3" in report.describe()


def test_the_self_test_opens_no_file_outside_the_folder(folder_copy):
    noise_picture(0).save(folder_copy.parent / "outside.png")
    entries = json.loads((folder_copy / "selftest.json").read_text())
    entries[0]["image"] = "../outside.png"
    (folder_copy / "selftest.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="not a file inside"):
        check_self_test(folder_copy)


def test_the_card_states_lineage_scores_and_requirements(folder):
    card = (folder / "README.md").read_text()
    for stated in (
        "| eos_bridged_reconstruction | 10 |",
        "| unseen_picture | 0.27 |",
        "random weights",
        "1 CPU second",
        'license: "apache-2.0"',
        "transformers >= 5.18",
        "for every batch without padding",
        INSTRUCTION,
        f"at {MAX_TEXT_TOKENS} tokens",
    ):
        assert stated in card
    difference = float(re.search(r"at most ([\d.e+-]+) in any number", card)[1])
    assert 0 < difference < 0.05


FRESH_SCRIPT = """
import importlib.util, json, pathlib, sys
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
assert importlib.util.find_spec("torchvision") is None, "torchvision came along"
assert importlib.util.find_spec("cocoa_dist") is None, "our package is visible"
folder = pathlib.Path(sys.argv[1])
model = SentenceTransformer(str(folder), device="cpu")
worst = 0.0
entries = json.loads((folder / "selftest.json").read_text())
for entry in entries:
    parts = {} if entry["text"] is None else {"text": entry["text"]}
    if entry["image"] is not None:
        parts["image"] = Image.open(folder / entry["image"])
    found = model.encode([parts], prompt=entry["instruction"])[0]
    worst = max(worst, float(np.abs(found - np.array(entry["vector"])).max()))
print(json.dumps({"entries": len(entries), "worst": worst}))
"""


@pytest.mark.slow
def test_the_folder_works_in_a_fresh_environment_without_our_package(folder, tmp_path):
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    packages = ["sentence-transformers", "pillow", f"torch=={torch.__version__.split('+')[0]}"]
    index = os.environ.get("COCOA_TORCH_INDEX")
    extra = ["--extra-index-url", index] if index else []
    install = [python, "-m", "pip", "install", "--quiet", *extra, *packages]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=1800, check=False)
    if installed.returncode:
        pytest.skip(f"pip cannot install {packages}: {installed.stderr[-500:]}")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", FRESH_SCRIPT, folder],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=tmp_path,
        env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["entries"] == len(cases())
    assert result["worst"] < TOLERANCE
    sys.stdout.write(f"fresh environment: {result}\n")
