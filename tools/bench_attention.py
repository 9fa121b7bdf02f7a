r"""What segment attention costs: every backend and rule, beside what one would write without it.

    python tools/bench_attention.py --device cpu
    python tools/bench_attention.py --device cpu --tokens 512 --rules eos_bridged --repeats 3
    python tools/bench_attention.py --device cuda --out benchmarks/gpu_h200

Each case is one pack under one rule. Its arms take turns, so that a busy machine is busy for all:

    ours       segment_attention, once for each backend that is here
    limit      'plain ...': the same problems on rows that already lie in order, without gathers.
               On a GPU through the same kernel, on the CPU one batched SDPA for each shape
    baseline   SDPA under a dense mask that is made beforehand; a loop over samples; FlexAttention
               with create_block_mask. Flex has no backward pass on the CPU; our backend runs it
               uncompiled there, for checking alone

How to read the table: times are medians over --repeats, `spread` is the quartiles' distance in per
cent of the median. CPU: process CPU seconds on one thread. CUDA: events, with the work queued
ahead, as in a training step whose host runs ahead of the card; `host ms` is what queueing one
forward and backward pass takes. TFLOP/s count visible pairs alone: 4 x pairs x query heads x width
forward, 3.5 times that forward and backward. `peak MiB` is what one forward and backward pass
allocates at most beyond its inputs (CPU: the profiler's allocation records; CUDA: the caching
allocator). `prepare ms` is done once a batch on the host: the plan, the dense mask, the block mask.

Below the tables every claim of the project is printed as PASS or FAIL with the number found.
--out writes both as NAME.md and NAME.json.
"""

import argparse
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # works in a checkout that is not installed

import attention_arms as arms  # noqa: E402
import attention_timing as timing  # noqa: E402
import torch  # noqa: E402
from attention_arms import RULES, Arm, Case, Heads, make_case  # noqa: E402
from attention_report import Claim, Report, Row, print_report, with_limits, write_report  # noqa: E402

from cocoa_dist.attention import choose_backend  # noqa: E402
from cocoa_dist.attention import compile as plan_compiler  # noqa: E402

BACKWARD_FACTOR = 3.5  # forward and backward, in forwards: scores once, then five products for two
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
WARM_UPS = 2


@dataclass(frozen=True)
class Setting:
    """What a device is measured on."""

    heads: tuple[Heads, ...]
    tokens: tuple[int, ...]
    tokens_a_sample: int
    dtype: torch.dtype
    rules: tuple[str, ...]


SETTINGS = {
    "cpu": Setting(
        heads=(Heads(8, 8, 64), Heads(12, 2, 128)),
        tokens=(2048,),
        tokens_a_sample=128,
        dtype=torch.float32,
        rules=tuple(name for name in RULES if name != "eos_bridged blind bridge"),
    ),
    "cuda": Setting(
        heads=(Heads(16, 2, 128), Heads(28, 4, 128)),
        tokens=(8192, 32768),
        tokens_a_sample=512,
        dtype=torch.bfloat16,
        rules=tuple(RULES),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns 2 for bad input, 1 with --strict where a claim fails."""
    arguments = _parser().parse_args(argv)
    try:
        device = _device(arguments.device)
        _check_out(arguments.out)
        bench = Bench(arguments, device)
        bench.run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_report(bench.report)
    if arguments.out is not None:  # once more: the claims came last
        for path in write_report(bench.report, arguments.out):
            print(f"written: {path}")
    failed = bench.report.faults or not all(claim.passed for claim in bench.report.claims)
    return 1 if arguments.strict and failed else 0


class Bench:
    """Holds what one run measures, and when its time is up."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        setting = SETTINGS[device.type]
        self.device, self.arguments, self.setting = device, arguments, setting
        self.tokens: tuple[int, ...] = tuple(arguments.tokens or setting.tokens)
        self.rules: tuple[str, ...] = tuple(arguments.rules or setting.rules)
        self.end = time.monotonic() + arguments.seconds
        self.report = Report(
            device=_describe(device), command=_command(arguments), note=arguments.note
        )
        torch.set_num_threads(1)

    def run(self) -> None:
        """Measure all cases, then what needs a compiler, which takes longest, then the claims."""
        cases = [
            (heads, tokens, rule)
            for heads in self.setting.heads
            for tokens in self.tokens
            for rule in self.rules
        ]
        for heads, tokens, rule in cases:
            self._one_case(heads, tokens, rule, flex=False)
        if self.device.type == "cpu":
            self._claims_cpu()
        else:
            self._claims_cuda()
        self._claim_repeatable()
        self._claim_plan()
        for heads, tokens, rule in cases if self.arguments.flex else ():
            if heads == self.setting.heads[0]:
                self._one_case(heads, tokens, rule, flex=True)

    def case(self, heads: Heads, tokens: int, rule: str, *, samples: int | None = None) -> Case:
        """Make a case in the device's dtype."""
        count = samples or self.arguments.samples
        count = count or max(1, tokens // self.setting.tokens_a_sample)
        return make_case(
            rule,
            heads,
            num_tokens=tokens,
            num_samples=count,
            device=self.device,
            dtype=self.setting.dtype,
        )

    def _one_case(self, heads: Heads, tokens: int, rule: str, *, flex: bool) -> None:
        title = f"{rule}, {tokens} tokens, {heads}"
        if time.monotonic() > self.end:
            self.report.skipped.append(
                f"{title}{', flex' if flex else ''}: the {self.arguments.seconds:.0f} s were up"
            )
            return
        print(f"measuring {title}", file=sys.stderr, flush=True)
        case = self.case(heads, tokens, rule)
        self.report.cases[title] = (
            f"{len(case.samples)} samples, {case.plan.visible_area} visible pairs "
            f"({100 * case.plan.visible_area / tokens**2:.1f} % of all), "
            f"plan {case.plan.nbytes / tokens:.0f} bytes a token"
        )
        if flex:
            # each case compiles anew: past a limit of versions it would not compile at all
            torch._dynamo.reset()
            makers = [_our_flex, _other_flex]
        else:
            makers = [_ours_without_flex, arms.limit_arms, arms.baseline_arms]
        entered = [arm for make in makers for arm in self._entered(title, case, make)]
        self.report.rows = with_limits([*self.report.rows, *self.measure(title, case, entered)])
        if self.arguments.out is not None:
            write_report(self.report, self.arguments.out)  # a run that is cut short leaves these

    def _entered(self, title: str, case: Case, make: Callable[[Case], list[Arm]]) -> list[Arm]:
        """Return the arms that run here and give the right numbers; the report names the others."""
        try:
            made = make(case)
        except RuntimeError as error:  # a mask of T x T that does not fit
            self._fault(title, make.__name__.strip("_"), error)
            return []
        return [arm for arm in made if self._runs(title, case, arm)]

    def _runs(self, title: str, case: Case, arm: Arm) -> bool:
        try:
            for _ in range(WARM_UPS):
                timing.run_once(arm, backward=arm.trains)
            wrong = arms.worst_difference(case, arm)
        except Exception as error:  # a kernel's compiler raises what it likes; the report names it
            self._fault(title, arm.name, error)
            return False
        fits = wrong <= TOLERANCE[case.q_THK.dtype]  # not so if it is NaN
        if not fits:
            self.report.faults.append(f"{title}: {arm.name} is off by {wrong:.1e}")
        return fits

    def _fault(self, title: str, name: str, error: Exception) -> None:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        self.report.faults.append(f"{title}: {name} did not run: {first_line[:200]}")

    def measure(self, title: str, case: Case, entered: Sequence[Arm]) -> list[Row]:
        """Time the arms in turn; one row each."""
        ahead = [arm for arm in entered if arm.trains]
        forward = self._in_turn(
            [(arm.name, partial(timing.run_once, arm, backward=False)) for arm in entered]
        )
        both = self._in_turn(
            [(arm.name, partial(timing.run_once, arm, backward=True)) for arm in ahead]
        )
        rows = []
        for arm in entered:
            once = statistics.median(forward[arm.name])
            times = both.get(arm.name)
            rows.append(
                Row(
                    case=title,
                    arm=arm.name,
                    kind=arm.kind,
                    forward_ms=1e3 * once,
                    both_ms=1e3 * statistics.median(times) if times else None,
                    spread=timing.spread(times or forward[arm.name]),
                    forward_tflops=case.flops / once / 1e12,
                    both_tflops=(
                        BACKWARD_FACTOR * case.flops / statistics.median(times) / 1e12
                        if times
                        else None
                    ),
                    peak_mib=timing.peak_bytes(arm, self.device) / 2**20,
                    prepare_ms=timing.prepare_ms(arm, self.device),
                    host_ms=timing.host_ms(arm) if self.device.type == "cuda" else None,
                )
            )
        return rows

    def _in_turn(self, work: Iterable[tuple[str, Callable[[], None]]]) -> dict[str, list[float]]:
        """Seconds a call of each, `repeats` times: forwards through the list, then backwards."""
        counted = [(name, call, timing.calls_a_timing(call, self.device)) for name, call in work]
        found: dict[str, list[float]] = {name: [] for name, _, _ in counted}
        for repeat in range(self.arguments.repeats):
            for name, call, count in counted if repeat % 2 == 0 else reversed(counted):
                found[name].append(timing.seconds(call, count, self.device))
        return found

    def _ratio(self, case: Case, slow: str, fast: str) -> float:
        """Forward and backward of one backend in times of another; median over paired timings."""
        found = {arm.name: arm for arm in arms.our_arms(case, with_flex=False)}
        pair = [
            (name, partial(timing.run_once, found[name], backward=True)) for name in (slow, fast)
        ]
        for _, call in pair:
            call()
        times = self._in_turn(pair)
        return statistics.median(s / f for s, f in zip(times[slow], times[fast], strict=True))

    def _claims_cpu(self) -> None:
        for heads in self.setting.heads:
            for rule in self.rules:
                ratio = self._ratio(self.case(heads, 2048, rule, samples=16), "dense", "split")
                self._claim(
                    f"dense / split, {rule}, 2048 tokens in 16 samples, {heads}", ratio, ">=", 6.0
                )
            for rule in self.rules:
                ratio = self._ratio(self.case(heads, 256, rule, samples=1), "dense", "split")
                self._claim(
                    f"dense / split, {rule}, 256 tokens in 1 sample, {heads}", ratio, ">=", 1.0
                )

    def _claims_cuda(self) -> None:
        """Beside the limit with the same kernel, and beside the card's best varlen rate."""
        chosen = choose_backend("auto", device=self.device, dtype=self.setting.dtype).name
        kernel = chosen if chosen in arms.CALL_BACKENDS else "varlen"
        for heads in self.setting.heads:
            by_case: dict[str, dict[str, Row]] = {}
            for row in self.report.rows:
                if row.case.endswith(str(heads)):
                    by_case.setdefault(row.case, {})[row.arm] = row
            limits = [r for rows in by_case.values() for r in rows.values() if r.kind == "limit"]
            peak = self._peak_rows(heads, kernel)
            best = max((r.both_tflops or 0.0 for r in [*peak, *limits]), default=0.0)
            for title, rows in by_case.items():
                if kernel in rows and f"plain {kernel}" in rows:
                    self._claims_of_case(title, rows[kernel], rows[f"plain {kernel}"], best)
                else:
                    self.report.faults.append(f"{title}: {kernel} was not measured: no claims")

    def _claims_of_case(self, title: str, ours: Row, plain: Row, best: float) -> None:
        """`best`: the card's best TFLOP/s, forward and backward."""
        both = (ours.both_ms or math.inf) / (plain.both_ms or math.nan)
        once = ours.forward_ms / plain.forward_ms
        self._claim(f"{ours.arm} / plain, forward, {title}", once, "<=", 1.05)
        self._claim(f"{ours.arm} / plain, forward and backward, {title}", both, "<=", 1.05)
        share = (ours.both_tflops or 0.0) / best
        self._claim(f"share of the best varlen rate, {best:.0f} TFLOP/s, {title}", share, ">=", 0.6)

    def _peak_rows(self, heads: Heads, kernel: str) -> list[Row]:
        """One sequence of the longest pack: what the card's varlen kernel can do at all."""
        tokens = max(self.tokens)
        case = self.case(heads, tokens, "bidirectional", samples=1)
        title = f"one sequence, {tokens} tokens, {heads}"
        entered = self._entered(title, case, lambda case: [arms.plain_calls(case, kernel)])
        rows = self.measure(title, case, entered)
        self.report.cases[title] = "the card's best case, for the shares below"
        self.report.rows += rows
        return rows

    def _claim_repeatable(self) -> None:
        """Two passes give the same bits under every rule, where torch is asked for determinism."""
        chosen = choose_backend("auto", device=self.device, dtype=self.setting.dtype)
        for heads in self.setting.heads:
            for rule in self.rules:
                case = self.case(heads, min(self.tokens), rule)
                label = f"{rule}, {case.plan.num_tokens} tokens, {heads}"
                try:
                    self._claim_repeats(case, chosen.name, label)
                except RuntimeError as error:  # torch has no deterministic way for one of its parts
                    self._fault(label, f"{chosen.name}, deterministic,", error)

    def _claim_repeats(self, case: Case, backend: str, label: str) -> None:
        (arm,) = [a for a in arms.our_arms(case, with_flex=True) if a.name == backend]
        unasked, number = timing.repeated(arm)
        both = partial(timing.run_once, arm, backward=True)
        quick = self._in_turn([("both", both)])["both"]
        with timing.deterministic():
            same, number = timing.repeated(arm)
            slow = self._in_turn([("both", both)])["both"]
        self._claim(
            f"of output, dq, dk, dv repeat to the bit, {backend}, {label}", same, ">=", number
        )
        price = statistics.median(slow) / statistics.median(quick)
        self.report.remarks.append(
            f"without torch.use_deterministic_algorithms {unasked} of {number} repeat, "
            f"with it a pass takes {price:.2f} times as long: {backend}, {label}"
        )

    def _claim_plan(self) -> None:
        """Plan of 16,384 tokens in 256 samples: shapes never seen before, and bytes."""
        for rule in self.rules:
            bridge = 8 if rule == "compression" else 1  # 64 tokens a sample leave no room for 32
            samples = arms.make_samples(16384, 256, bridge=bridge, seed=1)
            times = []
            for _ in range(max(5, self.arguments.repeats)):
                for cached in vars(plan_compiler).values():
                    getattr(cached, "cache_clear", lambda: None)()
                begin = time.process_time()
                plan = plan_compiler.compile_plan(samples, RULES[rule])
                times.append(1e3 * (time.process_time() - begin))
            label = f"{rule}, 16384 tokens in 256 samples"
            self._claim(f"CPU ms of a plan, best of {len(times)}, {label}", min(times), "<=", 5.0)
            self._claim(f"bytes a token of a plan, {label}", plan.nbytes / 16384, "<=", 64.0)

    def _claim(self, text: str, found: float, sign: str, limit: float) -> None:
        self.report.claims.append(Claim(text, found, sign, limit))


def _ours_without_flex(case: Case) -> list[Arm]:
    return arms.our_arms(case, with_flex=False)


def _our_flex(case: Case) -> list[Arm]:
    return [arm for arm in arms.our_arms(case, with_flex=True) if arm.name == "flex"]


def _other_flex(case: Case) -> list[Arm]:
    return [arms.flex_arm(case)]


def _device(name: str) -> torch.device:
    """Return the device. Raises ValueError if it is not here."""
    if name == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA at all"
        raise ValueError(
            f"--device cuda, but torch {torch.__version__} (built for {built}) finds no CUDA "
            "device: run on a machine with one, or use --device cpu"
        )
    return torch.device(name)


def _check_out(out: Path | None) -> None:
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist; make it first")


def _describe(device: torch.device) -> str:
    """Say what was measured on, in one line."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, bfloat16, {versions}"
    return (
        f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), one thread, "
        f"float32, {versions}"
    )


def _command(arguments: argparse.Namespace) -> str:
    parts = [f"python tools/bench_attention.py --device {arguments.device}"]
    parts += [f"--tokens {' '.join(map(str, arguments.tokens))}"] if arguments.tokens else []
    parts += [f"--samples {arguments.samples}"] if arguments.samples else []
    parts += ["--rules " + " ".join(f"'{r}'" for r in arguments.rules)] if arguments.rules else []
    parts += [f"--repeats {arguments.repeats}"]
    parts += [] if arguments.flex else ["--no-flex"]
    return " ".join(parts)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=sorted(SETTINGS), required=True)
    add(
        "--tokens",
        type=_positive,
        nargs="+",
        metavar="T",
        help="pack sizes (cpu 2048; cuda 8192 32768)",
    )
    add(
        "--samples",
        type=_positive,
        help="samples a pack (default: T / 128 on the CPU, T / 512 on CUDA)",
    )
    add("--rules", nargs="+", choices=list(RULES), metavar="RULE", help=f"of: {'; '.join(RULES)}")
    add("--repeats", type=_positive, default=7, help="timings of each arm (default 7)")
    add(
        "--seconds",
        type=float,
        default=1800.0,
        help="start no case after this long; says which (1800)",
    )
    add("--no-flex", dest="flex", action="store_false", help="leave out what has to be compiled")
    add("--strict", action="store_true", help="exit with 1 if a claim fails")
    add("--note", default="", help="a sentence for the head of the report")
    add("--out", type=Path, metavar="NAME", help="write NAME.md and NAME.json")
    return parser


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    sys.exit(main())
