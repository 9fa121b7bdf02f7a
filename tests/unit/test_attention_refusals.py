"""Which backend runs and why, and what bad input to segment_attention gets."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attention_oracle import (
    C,
    pack_of,
)

from cocoa_dist.attention import (
    AttentionPlan,
    available_backends,
    choose_backend,
    compile_plan,
    segment_attention,
)
from cocoa_dist.attention import kernels as kernels_module
from cocoa_dist.attention.backends import flash_attn, flash_attn_4, flex
from cocoa_dist.attention.kernels import BACKENDS
from cocoa_dist.segments import attention_rule

CUDA = torch.device("cuda", 0)  # a name; nothing is put there

# torch says so at each call outside torch.compile; on the CPU it is what we want
unfused_flex = pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile:UserWarning"
)


def plan_of(num_tokens: int) -> AttentionPlan:
    return compile_plan(pack_of([((C, num_tokens),)]), attention_rule("causal"))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((5, 4, 8), (5, 2, 8), (5, 2, 8)), "the plan is for 4 tokens, q has 5, k has 5"),
        (((4, 4, 8), (3, 2, 8), (3, 2, 8)), "the plan is for 4 tokens, q has 4, k has 3"),
        (((4, 3, 8), (4, 2, 8), (4, 2, 8)), "3 query heads of width 8 do not fit 2 key heads"),
        (((4, 2, 8), (4, 4, 8), (4, 4, 8)), "2 query heads of width 8 do not fit 4 key heads"),
        (((4, 2, 8), (4, 0, 8), (4, 0, 8)), "2 query heads of width 8 do not fit 0 key heads"),
        (((4, 4, 8), (4, 2, 6), (4, 2, 6)), "width 8 do not fit 2 key heads of width 6"),
        (((4, 4, 8), (4, 2, 8), (4, 4, 8)), r"expected q .* found \(4, 4, 8\), \(4, 2, 8\), \(4"),
        (((4, 0, 8), (4, 2, 8), (4, 2, 8)), "0 query heads of width 8 do not fit 2 key heads"),
        (((4, 2, 0), (4, 2, 0), (4, 2, 0)), "2 query heads of width 0 do not fit 2 key heads"),
        (((4, 4), (4, 2), (4, 2)), r"expected q \(T, H, K\) .* found \(4, 4\)"),
        (((1, 4, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), r"expected q .* found \(1, 4, 4, 8\)"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "dense", "split", "flex"])
def test_attention_refuses_shapes_that_do_not_fit(backend, shapes, message) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        segment_attention(q, k, v, plan=plan_of(4), backend=backend)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_attention_refuses_dtypes_that_differ(odd: int) -> None:
    tensors = [torch.zeros(4, 2, 8) for _ in range(3)]
    tensors[odd] = tensors[odd].bfloat16()
    with pytest.raises(ValueError, match=r"dtypes differ: .*torch\.bfloat16"):
        segment_attention(*tensors, plan=plan_of(4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_attention_refuses_a_dtype_that_has_no_softmax(dtype: torch.dtype) -> None:
    q = torch.zeros(4, 2, 8, dtype=dtype)
    with pytest.raises(ValueError, match=f"needs a floating-point dtype, found {dtype}"):
        segment_attention(q, q, q, plan=plan_of(4))


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_attention_refuses_devices_that_differ(odd: int) -> None:
    tensors = [torch.zeros(4, 2, 8) for _ in range(3)]
    tensors[odd] = tensors[odd].to("meta")
    with pytest.raises(ValueError, match=r"devices differ: .*meta.*plan cpu"):
        segment_attention(*tensors, plan=plan_of(4))


def test_attention_refuses_a_plan_on_another_device() -> None:
    q = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="devices differ: q cpu, k cpu, v cpu, plan meta"):
        segment_attention(q, q, q, plan=plan_of(4).to("meta"))


@unfused_flex
def test_attention_flex_on_the_cpu_refuses_gradients_and_names_another_backend() -> None:
    q, k, v = (torch.zeros(4, 2, 8, requires_grad=True) for _ in range(3))
    with pytest.raises(ValueError, match=r"no backward pass on the CPU; use .*split"):
        segment_attention(q, k, v, plan=plan_of(4), backend="flex")
    with torch.no_grad():
        out = segment_attention(q, k, v, plan=plan_of(4), backend="flex")
    assert not out.requires_grad


# Which backend runs


@pytest.fixture
def fresh_choices() -> Iterator[None]:
    """Forget choices before and after a test that pretends to be on another machine."""
    kernels_module._choose.cache_clear()
    yield
    kernels_module._choose.cache_clear()


@pytest.fixture
def no_flash_packages(monkeypatch: pytest.MonkeyPatch, fresh_choices: None) -> None:
    monkeypatch.setattr(flash_attn, "_flash_2", lambda: None)
    monkeypatch.setattr(flash_attn, "_flash_3", lambda: None)
    monkeypatch.setattr(flash_attn_4, "_function", lambda: None)


def pretend_card(monkeypatch: pytest.MonkeyPatch, *capability: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_attention_backends_that_train_on_the_cpu_are_dense_and_split() -> None:
    assert BACKENDS == ("dense", "split", "varlen", "flash_attn", "flash_attn_4", "flex")
    assert available_backends() == available_backends("cpu") == ("dense", "split")


def test_attention_auto_says_what_it_picks_on_the_cpu_and_why() -> None:
    choice = choose_backend("auto", device="cpu")
    assert choice.name == "split"
    assert "cpu" in choice.reason


@pytest.mark.parametrize(
    ("backend", "package"), [("flash_attn", "flash-attn "), ("flash_attn_4", "flash-attn-4$")]
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.usefixtures("no_flash_packages")
def test_attention_backend_that_is_missing_names_its_package(
    backend: str, package: str, device: str
) -> None:
    with pytest.raises(ValueError, match=f"'{backend}' cannot run here: .*pip install {package}"):
        choose_backend(backend, device=device, dtype=torch.bfloat16)


@pytest.mark.usefixtures("no_flash_packages")
def test_attention_with_a_missing_backend_fails_before_any_kernel() -> None:
    q = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match="pip install flash-attn"):
        segment_attention(q, q, q, plan=plan_of(4), backend="flash_attn")


def test_attention_varlen_without_a_gpu_says_so() -> None:
    with pytest.raises(ValueError, match="'varlen' cannot run here: it needs a CUDA device, found"):
        choose_backend("varlen", device="cpu", dtype=torch.bfloat16)


@pytest.mark.usefixtures("no_flash_packages")
def test_attention_asked_for_a_gpu_that_is_not_there_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'varlen' cannot run here: it needs a CUDA device, torch"):
        choose_backend("varlen", device=CUDA, dtype=torch.bfloat16)
    assert "varlen" not in available_backends(CUDA)
    assert "finds none" in choose_backend("auto", device=CUDA, dtype=torch.bfloat16).reason


@pytest.mark.usefixtures("fresh_choices")
def test_attention_varlen_in_float32_names_the_key_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_card(monkeypatch, 9, 0)
    with pytest.raises(ValueError, match=r"found torch\.float32: set model\.dtype=bfloat16"):
        choose_backend("varlen", device=CUDA, dtype=torch.float32)


@pytest.mark.usefixtures("fresh_choices")
def test_attention_varlen_on_an_old_card_says_what_it_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_card(monkeypatch, 7, 5)
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer, found 7\.5"):
        choose_backend("varlen", device=CUDA, dtype=torch.bfloat16)


@pytest.mark.usefixtures("fresh_choices")
def test_attention_varlen_in_a_torch_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_card(monkeypatch, 9, 0)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ValueError, match=r"no torch\.nn\.attention\.varlen: install torch"):
        choose_backend("varlen", device=CUDA, dtype=torch.bfloat16)


@pytest.mark.usefixtures("fresh_choices")
def test_attention_flash_4_on_ampere_says_that_it_cannot_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_card(monkeypatch, 8, 6)
    monkeypatch.setattr(flash_attn_4, "_function", lambda: object())
    with pytest.raises(ValueError, match=r"needs compute capability 9\.0 or newer, found 8"):
        choose_backend("flash_attn_4", device=CUDA, dtype=torch.bfloat16)


@pytest.mark.usefixtures("no_flash_packages")
def test_attention_flash_3_alone_off_hopper_names_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_card(monkeypatch, 8, 0)
    monkeypatch.setattr(flash_attn, "_flash_3", lambda: object())
    with pytest.raises(ValueError, match="needs a Hopper card: install flash-attn"):
        choose_backend("flash_attn", device=CUDA, dtype=torch.bfloat16)


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface"])
def test_attention_package_built_for_another_torch_is_as_good_as_none(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    assert flash_attn._function(module) is None


@pytest.mark.parametrize("backend", ["varlen", "flash_attn_4"])
def test_attention_refuses_a_width_that_kernels_do_not_take(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kernels_module, "_choose", lambda *_: kernels_module.BackendChoice(backend, "")
    )
    q = torch.zeros(4, 2, 12)
    with pytest.raises(ValueError, match=f"'{backend}' takes heads .* multiple of 8, found 12"):
        segment_attention(q, q, q, plan=plan_of(4), backend=backend)


def test_attention_backend_that_is_unknown_is_answered_with_the_known_ones() -> None:
    q = torch.zeros(4, 2, 8)
    message = "unknown attention backend 'fast' .have: auto, dense, split, varlen, flash_attn, "
    with pytest.raises(ValueError, match=message):
        segment_attention(q, q, q, plan=plan_of(4), backend="fast")
    with pytest.raises(ValueError, match=message):
        choose_backend("fast")


@pytest.mark.usefixtures("no_flash_packages")
def test_attention_auto_on_a_gpu_takes_what_torch_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_card(monkeypatch, 9, 0)
    choice = choose_backend("auto", device=CUDA, dtype=torch.bfloat16)
    assert choice.name == "varlen"
    assert "nothing to install" in choice.reason


@pytest.mark.usefixtures("no_flash_packages")
def test_attention_auto_on_hopper_takes_flash_3_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_card(monkeypatch, 9, 0)
    monkeypatch.setattr(flash_attn, "_flash_3", lambda: object())
    assert choose_backend("auto", device=CUDA, dtype=torch.bfloat16).name == "flash_attn"


@pytest.mark.parametrize(("has_triton", "expected"), [(True, "flex"), (False, "split")])
@pytest.mark.usefixtures("no_flash_packages")
def test_attention_auto_in_float32_on_a_gpu_says_why_not_varlen(
    monkeypatch: pytest.MonkeyPatch, has_triton: bool, expected: str
) -> None:
    pretend_card(monkeypatch, 9, 0)
    monkeypatch.setattr(flex, "missing", lambda device, dtype: None if has_triton else "triton")
    choice = choose_backend("auto", device=CUDA, dtype=torch.float32)
    assert choice.name == expected
    assert "float32" in choice.reason
