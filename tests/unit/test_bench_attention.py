"""tools/bench_attention.py and tools/gpu_check.sh: what they compare, report and refuse."""

import dataclasses
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cocoa_dist.attention import segment_attention

ROOT = Path(__file__).resolve().parents[2]
TOOLS = str(ROOT / "tools")
TINY = ["--device", "cpu", "--tokens", "96", "--samples", "2", "--repeats", "2", "--no-flex"]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, TOOLS)
    import bench_attention

    yield bench_attention
    sys.path.remove(TOOLS)


@pytest.fixture(scope="module")
def arms(bench):
    return bench.arms


@pytest.fixture(autouse=True)
def _threads_stay():
    """The bench sets the number of threads; other tests do not ask for that."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(bench, monkeypatch):
    """Leave out the claims, which are measured on larger packs, and time nothing twice."""
    monkeypatch.setattr(bench.Bench, "_claims_cpu", lambda self: None)
    monkeypatch.setattr(bench.Bench, "_claim_plan", lambda self: None)
    monkeypatch.setattr(bench.timing, "LEAST_SECONDS", {"cpu": 0.0})


def make_case(arms, rule, *, heads=(4, 2, 16), tokens=160, samples=2):
    return arms.make_case(
        rule,
        arms.Heads(*heads),
        num_tokens=tokens,
        num_samples=samples,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def test_samples_tile_the_pack_and_differ_in_length(arms):
    samples = arms.make_samples(2048, 16, bridge=1, seed=0)
    flat = [s for sample in samples for s in sample]
    assert (flat[0].start, flat[-1].stop) == (0, 2048)
    assert all(a.stop == b.start for a, b in pairwise(flat))
    assert len({sample[-1].stop - sample[0].start for sample in samples}) > 8


def test_samples_without_room_for_their_segments_are_refused(arms):
    with pytest.raises(ValueError, match=r"256 tokens in 8 samples are 32 a sample, needed are 68"):
        arms.make_samples(256, 8, bridge=32, seed=0)


@pytest.mark.parametrize("rule", ["bidirectional", "causal", "eos_bridged", "compression"])
def test_every_arm_computes_the_same(arms, rule):
    case = make_case(arms, rule)
    entered = [*arms.our_arms(case, with_flex=False), *arms.baseline_arms(case)]
    assert {arm.name for arm in entered} >= {"dense", "split", "SDPA, dense mask"}
    for arm in entered:
        assert arms.worst_difference(case, arm) < 1e-5, arm.name


def test_the_mask_on_ids_is_the_rule(arms):
    """What FlexAttention is given, against the plan's table."""
    for rule in arms.RULES:
        case = make_case(arms, rule)
        rows = torch.arange(case.plan.num_tokens)
        zero = torch.zeros((), dtype=torch.int64)
        visible = arms._mask_mod_of_ids(case)(zero, zero, rows[:, None], rows[None, :])
        assert torch.equal(visible, case.plan.visibility()), rule


def test_the_limit_of_the_cpu_has_the_problems_of_the_plan(arms):
    """As many query rows and key rows as the plan's calls."""
    case = make_case(arms, "eos_bridged target_causal")
    (arm,) = arms.limit_arms(case)
    rows = sum(out.shape[0] * out.shape[2] for out in arm.forward())
    assert rows == case.plan.num_tokens
    keys = sum(leaf.shape[0] * leaf.shape[2] for leaf in arm.inputs[1::3])
    assert keys == sum(call.num_k for call in case.plan.calls)


def test_the_limit_of_a_gpu_runs_each_call_on_rows_in_order(arms, monkeypatch):
    """The kernel is replaced by SDPA, which needs no GPU; the plain calls then fit together."""
    from cocoa_dist.attention.backends import varlen

    def kernel(q, k, v, call, scale):
        parts = zip(
            q.split(call.lengths_q), k.split(call.lengths_k), v.split(call.lengths_k), strict=True
        )
        return torch.cat([one(*part, causal=call.causal) for part in parts])

    def one(q, k, v, *, causal):
        n_q, n_k = len(q), len(k)
        mask = torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q) if causal else None
        q, k, v = (rows.transpose(0, 1)[None] for rows in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    monkeypatch.setattr(varlen, "_kernel", kernel)
    case = make_case(arms, "eos_bridged target_causal")
    expected = segment_attention(*case.inputs, plan=case.plan)
    torch.testing.assert_close(varlen.run(*case.inputs, case.plan, None), expected)
    arm = arms.plain_calls(case, "varlen")
    outs = arm.forward()
    assert [len(out) for out in outs] == [call.num_q for call in case.plan.calls]
    assert sum(map(len, outs)) == case.plan.num_tokens
    torch.autograd.backward(outs, arm.gradients)
    assert all(leaf.grad is not None for leaf in arm.inputs)


def test_peak_memory_counts_what_is_held_at_a_time(bench, arms):
    leaf = torch.zeros(256, 1024, requires_grad=True)  # 1 MiB

    def forward():
        first = leaf.detach() + 1
        second = first + 1
        del first
        return (second + 1,)  # second and third at a time

    arm = arms.Arm("three", "ours", forward, (leaf,), (), trains=False)
    assert bench.timing.peak_bytes(arm, torch.device("cpu")) == pytest.approx(2 * 2**20, rel=0.01)


def test_the_report_holds_every_arm_and_claim(bench, quick, tmp_path, capsys):
    out = tmp_path / "cpu"
    asked = [*TINY, "--rules", "eos_bridged", "--out", str(out), "--note", "a note"]
    assert bench.main(asked) == 0
    printed = capsys.readouterr().out
    whole = json.loads(out.with_suffix(".json").read_text())
    assert out.with_suffix(".md").read_text() in printed
    assert "a note" in printed
    assert {row["arm"] for row in whole["rows"]} == {
        "dense",
        "split",
        "plain SDPA",
        "loop over samples",
        "SDPA, dense mask",
    }
    for row in whole["rows"]:
        assert row["forward_ms"] > 0, row
        assert row["both_ms"] > 0, row
        assert row["peak_mib"] > 0, row
        assert f"| {row['arm']} | {row['kind']} |" in printed
    assert [claim["passed"] for claim in whole["claims"]] == [True, True]
    assert "PASS  4 (wanted >= 4)  of output, dq, dk, dv repeat to the bit, split" in printed
    assert not whole["faults"]


def test_a_terminal_gets_tables(bench, quick, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    assert bench.main([*TINY, "--rules", "causal"]) == 0
    printed = capsys.readouterr().out
    assert "loop over samples" in printed
    assert "| ---" not in printed


def test_an_arm_with_other_numbers_is_a_fault_and_not_measured(bench, arms, quick, monkeypatch):
    def blind(sample, case):
        size = sample[-1].stop - sample[0].start
        return torch.eye(size, dtype=torch.bool)

    monkeypatch.setattr(arms, "_own_mask", blind)
    report = run(bench, [*TINY, "--rules", "eos_bridged"])
    assert any("loop over samples is off by" in line for line in report.faults)
    assert "loop over samples" not in {row.arm for row in report.rows}
    assert "split" in {row.arm for row in report.rows}


def test_an_arm_that_does_not_run_is_named_and_the_others_are_measured(
    bench, arms, quick, monkeypatch
):
    def no_memory(case):
        raise torch.OutOfMemoryError("tried to allocate 9 TiB\nmore")

    no_memory.__name__ = "baseline_arms"
    monkeypatch.setattr(arms, "baseline_arms", no_memory)
    report = run(bench, [*TINY, "--rules", "eos_bridged"])
    assert any("baseline_arms did not run: tried to allocate 9 TiB" in f for f in report.faults)
    assert "split" in {row.arm for row in report.rows}


def test_strict_fails_where_a_claim_does(bench, quick, monkeypatch, capsys):
    monkeypatch.setattr(
        bench.Bench, "_claim_plan", lambda self: self._claim("made up", 2.0, "<=", 1.0)
    )
    assert bench.main([*TINY, "--rules", "causal"]) == 0
    assert "FAIL  2 (wanted <= 1)  made up" in capsys.readouterr().out
    assert bench.main([*TINY, "--rules", "causal", "--strict"]) == 1


def test_an_arm_that_fails_takes_no_other_with_it(bench, arms, quick, monkeypatch):
    """The first backend of all, with an error that is none of torch's."""
    from cocoa_dist.attention.backends import dense

    def no_kernel(*anything):
        raise TypeError("the compiler changed its mind")

    monkeypatch.setattr(dense, "run", no_kernel)
    report = run(bench, [*TINY, "--rules", "eos_bridged"])
    assert any("dense did not run: the compiler changed its mind" in f for f in report.faults)
    assert {"split", "plain SDPA"} <= {row.arm for row in report.rows}


def test_claims_about_a_card_compare_with_the_same_kernel(bench, monkeypatch):
    """On figures made up: 4 % and 20 % behind the limit, 90 % and 50 % of the best rate."""
    heads = bench.SETTINGS["cpu"].heads[0]
    made = bench.Bench(bench._parser().parse_args(TINY), torch.device("cpu"))
    for rule, ours, rate in (("causal", 1.04, 360.0), ("compression", 1.2, 200.0)):
        title = f"{rule}, 8192 tokens, {heads}"
        row = bench.Row(title, "varlen", "ours", ours, ours, 0.0, rate, rate, 1.0, 1.0, 1.0)
        made.report.rows.append(row)
        made.report.rows.append(
            dataclasses.replace(row, arm="plain varlen", kind="limit", forward_ms=1.0, both_ms=1.0)
        )
    best = dataclasses.replace(row, arm="plain varlen", kind="limit", both_tflops=400.0)
    monkeypatch.setattr(bench.Bench, "_peak_rows", lambda self, heads, kernel: [best])
    made._claims_cuda()
    verdicts = [(claim.text.split(",")[0], claim.passed) for claim in made.report.claims]
    assert verdicts == [
        ("varlen / plain", True),
        ("varlen / plain", True),
        ("share of the best varlen rate", True),
        ("varlen / plain", False),
        ("varlen / plain", False),
        ("share of the best varlen rate", False),
    ]
    assert not made.report.faults


def test_cases_behind_the_time_limit_are_listed(bench, quick):
    report = run(bench, [*TINY, "--rules", "eos_bridged", "--seconds", "0"])
    assert not report.rows
    assert report.skipped == [
        f"eos_bridged, 96 tokens, {heads}: the 0 s were up" for heads in bench.SETTINGS["cpu"].heads
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu", "--out", "/none/there/x"], "the folder /none/there does not exist"),
        (["--device", "cpu", "--tokens", "64", "--samples", "16"], "needed are 6: give more"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(bench, quick, capsys, arguments, said):
    assert bench.main(arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused(bench, capsys):
    assert bench.main(["--device", "cuda"]) == 2
    assert "finds no CUDA device: run on a machine with one" in capsys.readouterr().err


def run(bench, arguments):
    """Run the bench as main does; its report."""
    made = bench.Bench(bench._parser().parse_args(arguments), torch.device("cpu"))
    made.run()
    return made.report


def gpu_check(*arguments: str, python: Path | str = sys.executable):
    command = ["bash", str(ROOT / "tools" / "gpu_check.sh"), *arguments]
    environment = {**os.environ, "COCOA_GPU_PYTHON": str(python)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environment
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_check_says_that_nothing_was_measured(tmp_path):
    done = gpu_check("--out", str(tmp_path / "reports"))
    assert done.returncode == 0, done.stderr
    assert f"with torch of {sys.executable}, and with nvidia-smi" in done.stdout
    assert f"found torch {torch.__version__}" in done.stdout
    assert "nothing was measured; no file was written" in done.stdout
    assert done.stdout.splitlines()[-1] == "gpu_check: SKIPPED (no CUDA device)"
    assert not (tmp_path / "reports").exists()


def test_gpu_check_without_torch_is_skipped_too(tmp_path):
    done = gpu_check(python=tmp_path / "python")
    assert done.returncode == 0
    assert f"found no {tmp_path / 'python'}" in done.stdout
    assert "SKIPPED" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fast"], "unknown argument '--fast'"),
        (["--wheels"], "--wheels needs a value"),
        (["--seconds", "5"], "expected a whole number of at least 60"),
        (["--seconds", "soon"], "--seconds soon"),
    ],
)
def test_gpu_check_refuses_what_it_does_not_know(arguments, said):
    done = gpu_check(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_check_runs_tests_and_bench_in_an_environment_of_its_own(tmp_path):
    """With a Python that claims a GPU: the tests skip, the bench refuses, the check fails."""
    claims = tmp_path / "python"
    claims.write_text(
        f'#!/bin/sh\nif [ "$1" = - ]; then echo "NVIDIA Fake 1|torch 9"; '
        f'else exec {sys.executable} "$@"; fi\n'
    )
    claims.chmod(0o755)
    done = gpu_check("--out", str(tmp_path), "--wheels", str(tmp_path), python=claims)
    assert done.returncode == 1
    assert "skipped" in done.stdout, "pytest and torch were found from within the new environment"
    assert "finds no CUDA device" in done.stderr
    assert "report   none: the bench ended with exit code 2" in done.stdout
