"""Data sets behind a real S3 server on loopback: the same order, the same bytes, and restarts.

The server (moto) gets an environment of its own, and the client (boto3) a folder of its own unless
it is installed: neither is part of the project's environment.
"""

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cocoa_dist.config import ASSET_DIR
from cocoa_dist.data.records import Record, image_part, text_part
from cocoa_dist.data.shards import write_shards
from cocoa_dist.metrics import read_json_lines

SERVER = Path(__file__).with_name("s3_server.py")
MOTO = "moto[server]==5.2.5"
STAGE = "joint_reconstruction"
STEPS = 16
pytestmark = pytest.mark.slow


@dataclass
class Server:
    """The S3 server and what its clients need to know."""

    python: Path  # of the environment that has moto
    folder: Path  # what it serves
    port: int
    log: Path
    environment: dict[str, str]  # of clients
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.python), str(SERVER), str(self.port), str(self.folder), "data"],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(timeout=10)

    def requests(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "HTTP/1.1" in line]


def pip(*arguments: str) -> None:
    """Install, or skip with what pip says."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"packages cannot be had here: {done.stderr.strip().splitlines()[-1]}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def large_record(number: int) -> Record:
    """A record of 0.6 MB, so that the caches of a loader hold a part of them only."""
    pixels = np.random.default_rng(number).integers(0, 256, (450, 450, 3), dtype=np.uint8)
    header = b"BM" + (54 + pixels.size + 900).to_bytes(4, "little") + bytes(4)
    header += (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    header += (450).to_bytes(4, "little") * 2 + (1).to_bytes(2, "little")
    header += (24).to_bytes(2, "little") + bytes(24)
    rows = np.zeros((450, 1352), dtype=np.uint8)  # rows are padded to four bytes
    rows[:, :1350] = pixels.reshape(450, 1350)
    return Record(
        key=f"k{number}",
        task="t",
        query=(text_part(f"noise number {number}"),),
        positives=((image_part(0),),),
        target=(text_part(f"noise number {number}: grey and coarse"),),
        images=(header + rows.tobytes(),),
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("s3")
    environment, client = folder / "moto", folder / "client"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip("--python", str(environment / "bin" / "python"), "install", "--quiet", MOTO)
    try:
        importlib.metadata.version("boto3")
        client.mkdir()
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("botocore")
        packages = (f"boto3=={version}", f"botocore=={version}")
        pip("install", "--quiet", "--target", str(client), *packages)
    tree = folder / "tree"
    write_shards(
        (large_record(number) for number in range(200)),
        tree / "sets" / "noise",
        info={},
        records_per_batch=2,
        records_per_shard=50,
    )
    subprocess.run(["cp", "-r", str(ASSET_DIR / "emoji" / "validation"), str(tree)], check=True)
    port = free_port()
    options = f'{{base_path: "", endpoint_url: "http://127.0.0.1:{port}", region_name: us-east-1}}'
    profiles = folder / "msc.yaml"
    profiles.write_text(
        "profiles:\n  store:\n    storage_provider:\n      type: s3\n"
        f"      options: {options}\n    credentials_provider:\n      type: S3Credentials\n"
        "      options: {access_key: test, secret_key: test}\n"
    )
    clients = {
        **os.environ,
        "MSC_CONFIG": str(profiles),
        "PYTHONPATH": os.pathsep.join([str(client), str(Path(__file__).parents[1] / "unit")]),
    }
    made = Server(environment / "bin" / "python", tree, port, folder / "server.log", clients)
    made.start()
    yield made
    made.stop()


def in_child(server: Server, program: str, *arguments: object) -> Any:
    """Run a program with the client; return what it prints as JSON in its last line."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


RECORDS = """
import json, sys
from cocoa_dist.data.records import record_crc32
from cocoa_dist.data.shards import ShardReader
reader = ShardReader(sys.argv[1], cache_bytes=4 * 2**20)
most = 0
checksums = []
for number in range(len(reader)):
    checksums.append(record_crc32(reader.record(number)))
    most = max(most, reader._state.cached_bytes)
print(json.dumps([reader.fingerprint, checksums, most, str(reader.location(61))]))
"""


def test_every_record_is_the_same_by_ranged_reads_and_in_bounded_memory(server: Server) -> None:
    before = len(server.requests())
    local = in_child(server, RECORDS, server.folder / "sets" / "noise")
    remote = in_child(server, RECORDS, "msc://store/data/sets/noise")
    held, heads = remote.pop(2), local.pop(2)
    assert remote == local
    assert 10**6 < held <= 4 * 2**20 + 10**6
    assert heads < 10**6  # from a folder pictures are read one by one
    shards = [line for line in server.requests()[before:] if "GET" in line and "shard-" in line]
    assert len(shards) == 100  # one a batch
    assert all('" 206' in line for line in shards)


LOADER = """
import json, sys
from pathlib import Path
from test_loader import config, read, summary
from test_loader import TOKENIZER, Vocabulary
where, folder, workers, world = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
run = config({"a": where}, workers=workers, view="pair")
words = Vocabulary.load(TOKENIZER, run.model)
steps = read(run, words, folder, steps=5, world_size=world)
print(json.dumps([[sorted(map(str, s.items())) for s in map(summary, steps)]], default=sorted))
"""


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 1), (2, 2)])
def test_the_order_and_the_batches_are_those_of_a_folder(
    workers: int, world: int, server: Server, tmp_path: Path
) -> None:
    """With workers the clients are made after the fork, in processes that the parent had one."""
    local = in_child(server, LOADER, server.folder / "validation", tmp_path / "a", 0, world)
    remote = in_child(server, LOADER, "msc://store/data/validation", tmp_path / "b", workers, world)
    assert remote == local


FAILING = """
import json, sys
from cocoa_dist.data.shards import ShardReader
try:
    ShardReader(sys.argv[1])
except ValueError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("msc://store/data/nothing", "is not a data set: it has no manifest.json"),
        ("msc://nobody/data/validation", "no client for profile 'nobody'"),
    ],
)
def test_a_wrong_address_is_named_at_once(where: str, message: str, server: Server) -> None:
    began = time.monotonic()
    assert message in in_child(server, FAILING, where)
    assert time.monotonic() - began < 20


def train(server: Server, where: str, run_dir: Path) -> subprocess.Popen[bytes]:
    run_dir.mkdir()
    source = f"stages.{STAGE}.data.sources.emoji"
    with (run_dir / "out.txt").open("wb") as out:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "cocoa_dist.train", "debug", "--stage", STAGE),
                *("--run-dir", str(run_dir), f"stages.{STAGE}.steps={STEPS}"),
                *(f"{source}.path={where}", f"{source}.limit=null", "data.num_workers=1"),
                "data.image.cache_bytes=0",
            ],
            env=server.environment,
            stdout=out,
            stderr=out,
        )


def losses(run_dir: Path) -> list[tuple[int, str, float]]:
    lines = list(read_json_lines(run_dir / "metrics.jsonl"))
    return [(line["step"], line["batch_digest"], line["loss"]) for line in lines]


def test_a_restart_of_the_server_in_the_middle_of_training_changes_nothing(
    server: Server, tmp_path: Path
) -> None:
    local = train(server, str(server.folder / "sets" / "noise"), tmp_path / "local")
    assert local.wait(timeout=300) == 0, (tmp_path / "local" / "out.txt").read_text()
    run_dir = tmp_path / "remote"
    remote = train(server, "msc://store/data/sets/noise", run_dir)
    deadline = time.monotonic() + 200
    while len(losses(run_dir)) < 4:
        assert remote.poll() is None, (run_dir / "out.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    server.stop()
    time.sleep(3.0)
    assert remote.poll() is None
    server.start()
    after = len(server.requests())
    assert remote.wait(timeout=300) == 0, (run_dir / "out.txt").read_text()
    assert len(server.requests()) > after + 10  # it went on reading
    assert "fails, trying again in" in (run_dir / "out.txt").read_text()
    assert len(losses(run_dir)) == STEPS
    assert losses(run_dir) == losses(tmp_path / "local")
    assert not any((run_dir / "quarantine").glob("*.jsonl"))
