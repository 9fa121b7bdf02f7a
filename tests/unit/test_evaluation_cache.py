"""Tests of cocoa_dist.evaluation.cache: vectors come back, whatever cut or changed the file."""

from pathlib import Path

import numpy as np
import pytest
from tiny_exports import tiny_export

from cocoa_dist.evaluation.cache import CacheWriter, VectorCache, item_key, model_digest


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_export(tmp_path_factory.mktemp("export") / "tiny")


def fill(folder: Path, count: int = 6) -> list[bytes]:
    keys = [item_key(f"text {i}", "") for i in range(count)]
    vectors = np.arange(count * 4, dtype=np.float32).reshape(count, 4)
    with CacheWriter(folder) as writer:
        writer.append(keys, vectors, truncated=[i == 2 for i in range(count)])
    return keys


def test_a_cache_gives_back_what_was_put_in(tmp_path):
    VectorCache(tmp_path)
    keys = fill(tmp_path)
    cache = VectorCache(tmp_path)
    np.testing.assert_array_equal(cache.vectors([keys[4], keys[1]])[:, 0], [16, 4])
    assert cache.truncated(keys) == 1
    assert item_key("other", "") not in cache


@pytest.mark.parametrize("cut", [1, 40, 57])
def test_a_record_cut_by_a_kill_is_as_if_it_were_not_there(tmp_path, cut):
    keys = fill(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    cache = VectorCache(tmp_path)
    known = [key in cache for key in keys]
    assert known == [True] * 5 + [False] if cut < 56 else [True] * 4 + [False] * 2


def test_a_changed_byte_is_noticed(tmp_path):
    keys = fill(tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    cache = VectorCache(tmp_path)
    assert [key in cache for key in keys] == [True] * 5 + [False]


def test_a_file_of_another_width_is_refused(tmp_path):
    fill(tmp_path)
    with CacheWriter(tmp_path) as writer:
        writer.append([item_key("a", "")], np.ones((1, 7), np.float32), truncated=[False])
    with pytest.raises(ValueError, match="no file of this cache"):
        VectorCache(tmp_path)


def test_a_key_tells_text_from_picture():
    assert item_key("ab", "") != item_key("a", "b")
    assert item_key("", "ab") != item_key("ab", "")


def test_the_digest_of_a_model_changes_with_what_decides_its_vectors(model, tmp_path):
    before = model_digest(model)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in model.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(model)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    (copy / "README.md").write_text("another card")
    assert model_digest(copy) == before
    (copy / "1_Pooling" / "config.json").write_text("{}")
    assert model_digest(copy) != before


# ------------------------------------------------------------------------------- the whole way
