"""The small parts: reading logs and metrics, hiding secrets, the command line."""

import json
import subprocess
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.codestate import describe_code, hide_secrets
from launcher.faults import Departure, choose_culprit, last_error_line, last_lines
from launcher.steplog import Follower, newest_first


def line(step: int, **more: object) -> str:
    return json.dumps({"stage": "a", "step": step, "epoch": "e", "time": float(step), **more})


@pytest.mark.parametrize("padding", [0, 10, 3000, 70_000])
def test_lines_come_newest_first_whatever_their_length(tmp_path, padding):
    lines = [line(step, fill="x" * padding) for step in range(1, 40)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert [record.step for record in newest_first(tmp_path)] == list(range(39, 0, -1))


def test_no_metrics_means_no_lines(tmp_path):
    assert list(newest_first(tmp_path)) == []
    (tmp_path / "metrics.jsonl").touch()
    assert list(newest_first(tmp_path)) == []


def test_the_follower_gives_whole_new_lines_and_notices_a_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + "\n")
    follower = Follower(tmp_path)
    assert follower.poll() == []
    with path.open("a") as file:
        file.write(line(2) + "\n" + line(3)[:10])
    assert [r.step for r in follower.poll()] == [2]
    with path.open("a") as file:
        file.write(line(3)[10:] + "\n")
    assert [r.step for r in follower.poll()] == [3]
    other = tmp_path / "other"
    other.write_text(line(1) + "\n" + line(2) + "\n" + line(3) + "\n" + line(4) + "\n")
    other.replace(path)
    assert [r.step for r in follower.poll()] == [1, 2, 3, 4]
    path.write_text(line(1) + "\n")
    assert [r.step for r in follower.poll()] == [1]


def log_file(folder: Path, text: str) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.log"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("hello\n", "hello"),
        ("Traceback\n  x\nValueError: bad\n", "ValueError: bad"),
        (
            "[rank1]: torch.OutOfMemoryError: no room\nlate noise\n",
            "torch.OutOfMemoryError: no room",
        ),
        ("KeyError: 1\nRuntimeError\nnoise", "RuntimeError"),
        ("\xff no utf8 \n", "\xff no utf8"),
    ],
)
def test_the_last_error_line_is_found(tmp_path, text, expected):
    assert last_error_line(log_file(tmp_path, text)) == expected


def test_the_culprit_is_not_the_one_that_lost_its_peer(tmp_path):
    victim = log_file(tmp_path, "RuntimeError: [gloo/pair.cc:1] Connection closed by peer\n")
    culprit = log_file(tmp_path, "ValueError: nan\n")
    departures = [Departure(0, 1, victim), Departure(1, 1, culprit)]
    assert choose_culprit(departures).rank == 1
    assert choose_culprit(departures[:1]).rank == 0


def test_the_last_message_keeps_its_indented_lines(tmp_path):
    log = log_file(tmp_path, "noise\nrecipe x:\n  a: wrong\n  b: wrong\n")
    assert last_lines(log) == "recipe x:\n  a: wrong\n  b: wrong"
    assert "no message" in last_lines(tmp_path / "none")


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrstuvwxyz",
        "password = hunter22",
        'API_KEY: "abc def"',
        "HUB_TOKEN=abcdefghijklmnopqrstuvwxyz0123",
        "AKIAABCDEFGHIJKLMNOP",
        "https://me:hunter22@example.org/x.git",
        "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_secrets_are_hidden(secret):
    hidden = hide_secrets(f"+before\n+{secret}\n+after\n")
    assert "[hidden]" in hidden
    assert "hunter22" not in hidden
    assert "abc" not in hidden.lower()
    assert hidden.endswith("+after\n")


def test_ordinary_code_is_not_hidden():
    code = '+mask_token: str = "<|mask|>"\n+tokens_per_pack: 8192\n+tokenizer: asset:tokenizer\n'
    assert hide_secrets(code) == code


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )


def test_code_state_has_commit_status_and_diff_without_secret_files(tmp_path):
    assert describe_code(tmp_path) == "not a git checkout\n"
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("one = 1\n")
    (tmp_path / "my.env").write_text("X=1\n")
    assert describe_code(tmp_path).startswith("commit none yet\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "a.py").write_text("one = 2\n")
    (tmp_path / "my.env").write_text("X=topsecretvalue\n")
    text = describe_code(tmp_path)
    assert len(text.split()[1]) == 40
    assert " M a.py" in text
    assert "+one = 2" in text
    assert "topsecretvalue" not in text
    folder = tmp_path / "installed"
    folder.mkdir()
    assert describe_code(folder) == "not a git checkout\n"


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "python -m launcher run quickstart --run-dir" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["stats", "x"], "did you mean 'status'"),
        (["run", "quickstart"], "--run-dir"),
        (
            ["run", "quickstart", "--run-dir", "x", "--nprocs", "3"],
            "unrecognized arguments: --nprocs 3",
        ),
        (["status", "x", "a=1"], "unrecognized arguments: a=1"),
        (["run", "quickstart", "--run-dir", "x", "--backend", "lokal"], "invalid choice"),
    ],
)
def test_wrong_words_on_the_command_line_leave_with_2(capsys, arguments, expected):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert expected in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_the_options(tmp_path, capsys):
    arguments = ["run", "quickstart", "seed=1", "--run-dir", str(tmp_path / "x"), "seeed=2"]
    assert main(arguments) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
