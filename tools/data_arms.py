"""The formats and readers that tools/bench_data.py compares, each as its users would write it.

Its own writer, its own reader, its own shuffle, its own way to resume. Libraries are imported when
an arm is used: not all of them live in one environment.
"""

import io
import json
import pickle
import random
import sys
import tarfile
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

SEED = 5
BATCH = 32  # records
BUFFER = 1000  # records of a shuffle buffer
SHARD_BYTES = 64 * 2**20
OWN = ("ours",)
LIBRARIES = {
    "webdataset": "webdataset",
    "mds": "streaming",
    "litdata": "litdata",
    "datasets": "datasets",
    "lance": "lance",
    "energon": "megatron.energon",
    "ours": "cocoa_dist.data.loader",
}


class Raw(NamedTuple):
    """A record as a reader gives it."""

    key: str
    image: bytes
    text: str


def plain(folder: Path) -> Iterator[Raw]:
    """Yield the records that bench_data.py has laid down."""
    with (folder / "plain" / "pictures.bin").open("rb") as data:
        for line in (folder / "plain" / "records.jsonl").read_text().splitlines():
            key, size, text = json.loads(line)
            yield Raw(key, data.read(size), text)


class Arm:
    """What all arms can be asked. `random` is None for those that cannot read one record."""

    random: Any = None

    def __init__(self, folder: Path) -> None:
        """Open a data set that `write` has written."""
        self.folder = folder

    def sequential(self) -> Iterator[Raw]:
        """Yield all records as they lie."""
        raise NotImplementedError

    def shuffled(self, start: int = 0) -> Iterator[Raw]:
        """Yield records in an order for training, from record `start` of it on."""
        raise NotImplementedError


class Ours(Arm):
    """ShardReader, in a uniform order: what a plan has for data sets of one window."""

    def __init__(self, folder: Path) -> None:
        from cocoa_dist.data.record_source import RecordSource
        from cocoa_dist.data.shards import ShardReader

        reader = ShardReader(folder / "ours")
        self._source = RecordSource("bench", reader, len(reader))

    def random(self, number: int) -> Raw:
        """Read one record, its checksum compared."""
        record = self._source.record(number)
        return Raw(record.key, record.images[0], record.target[0].text or "")

    def sequential(self) -> Iterator[Raw]:
        """See Arm."""
        return map(self.random, range(self._source.num_records))

    def shuffled(self, start: int = 0) -> Iterator[Raw]:
        """See Arm."""
        order = list(range(self._source.num_records))
        random.Random(SEED).shuffle(order)
        return map(self.random, order[start:])


class WebDataset(Arm):
    """Tar files through a shuffle buffer. It cannot resume: what was seen is read and dropped."""

    @staticmethod
    def write(folder: Path) -> None:
        """Write tar files of some 64 MB."""
        write_tars(folder, folder / "webdataset")

    def _open(self, *, shuffle: bool) -> Iterator[Raw]:
        import webdataset

        files = sorted(str(path) for path in (self.folder / "webdataset").glob("*.tar"))
        options = {"shardshuffle": len(files) if shuffle else False, "seed": SEED}
        data = webdataset.WebDataset(files, empty_check=False, **options)
        for row in data.shuffle(BUFFER) if shuffle else data:
            yield Raw(row["__key__"], row["png"], row["txt"].decode())

    def sequential(self) -> Iterator[Raw]:
        """See Arm."""
        return self._open(shuffle=False)

    def shuffled(self, start: int = 0) -> Iterator[Raw]:
        """See Arm."""
        return islice(self._open(shuffle=True), start, None)


class Energon(Arm):
    """energon's own tar path, with its shuffle buffer and its saved state."""

    @staticmethod
    def write(folder: Path) -> None:
        """Write tar files and energon's index beside them."""
        from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

        path = folder / "energon"
        write_tars(folder, path)
        names = sorted(file.name for file in path.glob("*.tar"))
        ratio = [("train", 1.0)]
        WebdatasetPreparator.prepare_dataset(path, names, split_parts_ratio=ratio, workers=1)
        (path / ".nv-meta" / "dataset.yaml").write_text(
            "__module__: megatron.energon\n__class__: CaptioningWebdataset\n"
            "field_map: {image: png, caption: txt}\n"
        )

    def _loader(self, *, shuffle: bool) -> Any:
        from megatron import energon

        class Raws(energon.DefaultTaskEncoder):  # type: ignore[misc]
            """Leaves pictures encoded, and makes no batches."""

            decoder = None

            @energon.stateless  # type: ignore[untyped-decorator]
            def encode_sample(self, sample: Any) -> Any:
                return sample

        data = energon.get_train_dataset(
            self.folder / "energon",
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            shuffle_buffer_size=BUFFER if shuffle else None,
            max_samples_per_sequence=100 if shuffle else None,
            task_encoder=Raws(),
            repeat=False,
        )
        loader = energon.get_savable_loader(data, watchdog_timeout_seconds=None)
        loader.pin_memory = False
        return loader

    def sequential(self) -> Iterator[Raw]:
        """See Arm."""
        return self._rows(self._loader(shuffle=False))

    def _rows(self, loader: Any) -> Iterator[Raw]:
        for row in loader:
            caption = row.caption.decode() if isinstance(row.caption, bytes) else row.caption
            yield Raw(row.__key__, row.image, caption)

    def shuffled(self, start: int = 0) -> Iterator[Raw]:
        """See Arm; from what save_state has saved."""
        loader = self._loader(shuffle=True)
        if start:
            loader.restore_state_rank(pickle.loads((self.folder / "energon.state").read_bytes()))
        return self._rows(loader)

    def save_state(self, start: int) -> None:
        """Save the state that a checkpoint would hold after `start` records."""
        loader = self._loader(shuffle=True)
        for _ in islice(iter(loader), start):
            pass
        (self.folder / "energon.state").write_bytes(pickle.dumps(loader.save_state_rank()))


class Mds(Arm):
    """MosaicML streaming from a local folder."""

    @staticmethod
    def write(folder: Path) -> None:
        """Write MDS shards."""
        from streaming import MDSWriter

        columns = {"key": "str", "image": "bytes", "text": "str"}
        with MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=SHARD_BYTES) as writer:
            for raw in plain(folder):
                writer.write(raw._asdict())

    def __init__(self, folder: Path) -> None:
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        self._local = str(folder / "mds")
        self._data = self._open(shuffle=False)

    def _open(self, *, shuffle: bool) -> Any:
        from streaming import StreamingDataset

        options = {"shuffle": shuffle, "shuffle_seed": SEED, "num_canonical_nodes": 1}
        return StreamingDataset(local=self._local, batch_size=BATCH, **options)

    def random(self, number: int) -> Raw:
        """Read one record."""
        return Raw(**self._data[number])

    def sequential(self) -> Iterator[Raw]:
        """See Arm."""
        return map(self.random, range(len(self._data)))

    def shuffled(self, start: int = 0) -> Iterator[Raw]:
        """See Arm."""
        data = self._open(shuffle=True)
        if start:
            data.load_state_dict(data.state_dict(start, from_beginning=True))
        return (Raw(**row) for row in data)


class LitData(Arm):
    """litdata from a local folder."""

    @staticmethod
    def write(folder: Path) -> None:
        """Write its chunks, as its `optimize` does with one worker."""
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(folder / "litdata"), chunk_bytes=SHARD_BYTES)
        for number, raw in enumerate(plain(folder)):
            writer.add_item(number, raw._asdict())
        writer.done()
        writer.merge(1)

    def _open(self, *, shuffle: bool) -> Any:
        from litdata import StreamingDataset

        return StreamingDataset(str(self.folder / "litdata"), shuffle=shuffle, seed=SEED)

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._data = self._open(shuffle=False)

    def random(self, number: int) -> Raw:
        """Read one record."""
        return Raw(**self._data[number])

    def sequential(self) -> Iterator[Raw]:
        """See Arm."""
        return (Raw(**row) for row in self._open(shuffle=False))

    def shuffled(self, start: int = 0) -> Iterator[Raw]:
        """See Arm."""
        data = self._open(shuffle=True)
        if start:
            data.load_state_dict(data.state_dict(start, 0, BATCH))
        return (Raw(**row) for row in data)


class HuggingFace(Arm):
    """Hugging Face datasets: mapped Arrow files, and indices for an order."""

    @staticmethod
    def write(folder: Path) -> None:
        """Write what save_to_disk writes."""
        import datasets

        columns: dict[str, list[Any]] = {"key": [], "image": [], "text": []}
        for raw in plain(folder):
            for name, value in raw._asdict().items():
                columns[name].append(value)
        kinds = {"key": "string", "image": "large_binary", "text": "string"}
        features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
        datasets.Dataset.from_dict(columns, features=features).save_to_disk(
            folder / "datasets", max_shard_size=SHARD_BYTES
        )

    def __init__(self, folder: Path) -> None:
        import datasets

        self._data = datasets.load_from_disk(str(folder / "datasets"))

    def random(self, number: int) -> Raw:
        """Read one record."""
        return Raw(**self._data[number])

    def sequential(self) -> Iterator[Raw]:
        """See Arm."""
        return (Raw(**row) for row in self._data)

    def shuffled(self, start: int = 0) -> Iterator[Raw]:
        """See Arm."""
        data = self._data.shuffle(seed=SEED)
        return (Raw(**row) for row in data.select(range(start, len(data))))


class Lance(Arm):
    """Lance: batches as they lie, and `take` for an order, a batch of indices at a time."""

    @staticmethod
    def write(folder: Path) -> None:
        """Write one Lance data set."""
        import lance
        import pyarrow as pa

        kinds = [("key", pa.string()), ("image", pa.large_binary()), ("text", pa.string())]
        table = pa.Table.from_pylist([r._asdict() for r in plain(folder)], schema=pa.schema(kinds))
        lance.write_dataset(table, str(folder / "lance"))

    def __init__(self, folder: Path) -> None:
        import lance

        self._data = lance.dataset(str(folder / "lance"))

    def _take(self, numbers: list[int]) -> Iterator[Raw]:
        return (Raw(**row) for row in self._data.take(numbers).to_pylist())

    def random(self, number: int) -> Raw:
        """Read one record."""
        return next(self._take([number]))

    def sequential(self) -> Iterator[Raw]:
        """See Arm."""
        for batch in self._data.to_batches(batch_size=256):
            yield from (Raw(**row) for row in batch.to_pylist())

    def shuffled(self, start: int = 0) -> Iterator[Raw]:
        """See Arm."""
        order = list(range(self._data.count_rows()))
        random.Random(SEED).shuffle(order)
        for begin in range(start, len(order), BATCH):
            yield from self._take(order[begin : begin + BATCH])


ARMS: dict[str, type[Arm]] = {
    "ours": Ours,
    "webdataset": WebDataset,
    "energon": Energon,
    "mds": Mds,
    "litdata": LitData,
    "datasets": HuggingFace,
    "lance": Lance,
}


def write_tars(folder: Path, out: Path) -> None:
    """Write tar files of some SHARD_BYTES with a picture and a text for each record."""
    out.mkdir()
    file, size = None, 0
    for raw in plain(folder):
        if file is None or size > SHARD_BYTES:
            if file is not None:
                file.close()
            name = out / f"{len(list(out.iterdir())):05d}.tar"
            file, size = tarfile.open(name, "w", format=tarfile.USTAR_FORMAT), 0
        for ending, data in (("png", raw.image), ("txt", raw.text.encode())):
            member = tarfile.TarInfo(f"{raw.key}.{ending}")
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
            size += len(data)
    if file is not None:
        file.close()


def without_torchvision() -> None:
    """Let MosaicML streaming be imported without torchvision, which reading does not need."""
    names = ("", ".datasets", ".transforms", ".transforms.functional")
    made = {f"torchvision{name}": types.ModuleType(f"torchvision{name}") for name in names}
    for name, module in made.items():
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        module.__dict__.update(VisionDataset=object, to_tensor=None, __version__="0")
        sys.modules[name] = module
