"""The leaf class that `.nv-meta/dataset.yaml` names: one data set of Arrow shards for energon.

Our own loader takes its reader and its place in the blend. A script that gives the data set, or a
blend of them, to energon's `get_train_dataset` gets its records by energon's own order, as crude
samples with the fields of a Record; pictures stay encoded.
"""

# No `from __future__ import annotations`: energon reads the annotations at run time.
import logging
from dataclasses import fields
from typing import Any

from megatron.energon import CrudeSample, SavableDataset, WorkerConfig
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.base_dataset import BaseCoreDatasetFactory
from megatron.energon.flavors.webdataset.sample_loader import (
    RawSampleData,
    WebdatasetSampleLoaderDataset,
)
from megatron.energon.flavors.webdataset.sharder import Sharder
from megatron.energon.flavors.webdataset.structs import FilteredSample, ShardInfo
from megatron.energon.source_info import SourceInfo
from megatron.energon.wrappers import MapDataset

from cocoa_dist.config import is_remote
from cocoa_dist.data.records import Record
from cocoa_dist.data.shards import ShardReader

log = logging.getLogger("cocoa_dist.data")
_PARALLEL_SLICES = 16  # that energon draws from at once, its own default


class ArrowDatasetFactory(BaseCoreDatasetFactory[CrudeSample], Sharder):  # type: ignore[misc]
    """One data set of Arrow shards.

    energon type-checks every annotated parameter as if it came from YAML, so the objects that it
    passes besides (a worker configuration, a subset) are taken without annotation.
    """

    __sample_type__ = CrudeSample

    def __init__(  # type: ignore[no-untyped-def]  # noqa: ANN204
        self,
        path: EPath,
        *,
        subflavors: dict[str, Any] | None = None,
        training: bool = True,
        shuffle_over_epochs: int | None = 1,
        max_samples_per_sequence: int | None = None,
        worker_config=None,  # noqa: ANN001
        subset=None,  # noqa: ANN001
        **_injected,  # noqa: ANN003
    ):
        self.path = path
        self.paths = [path]
        self.subflavors = dict(subflavors or {})
        self.subset = subset
        self.reader = ShardReader(plain_path(path))
        self._worker_config: WorkerConfig | None = worker_config
        self._max_in_sequence = max_samples_per_sequence
        self._epochs = shuffle_over_epochs if training else None

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def num_records(self) -> int:
        """Records that the blend uses of it, of the first ones.

        Raises ValueError if it has fewer than the blend asks for.
        """
        if self.subset is None:
            return len(self)
        try:
            begin, end = self.subset.compute_subset(len(self))
        except AssertionError as error:  # energon's word for it
            raise ValueError(
                f"{self.path} has {len(self)} records, its subset in the metadataset is "
                f"{self.subset.absolute_range}: lower subset.range, or end it with `end` ({error})"
            ) from error
        assert begin == 0, f"a subset from record {begin} on"  # read_metadataset refuses it
        return int(end)

    def build(self, worker_rotation_offset: int = 0) -> SavableDataset[CrudeSample]:
        """Return the records in energon's order, for scripts of their own; energon calls this."""
        if self._worker_config is None:
            raise ValueError(f"{self.path}: load it with energon's get_train_dataset")
        offsets = self.shard_workers(
            self._shards(),
            self._worker_config,
            max_samples_per_sequence=self._max_in_sequence,
            rotation_offset=worker_rotation_offset,
            subset=self.subset,
        )
        rows = WebdatasetSampleLoaderDataset(
            join_readers=[_Rows(self.path, self.reader)],
            workers_sample_slice_offsets=offsets,
            worker_config=self._worker_config,
            shuffle_over_epochs=self._epochs,
            parallel_slice_iters=1 if self._epochs is None else _PARALLEL_SLICES,
        )
        return MapDataset(
            rows,
            self._crude,
            stateless_map_fn=True,
            map_fn_config=self.config,
            worker_config=self._worker_config,
        )

    def _shards(self) -> list[ShardInfo]:
        names = [self.reader.location(begin).shard for begin, _ in self.reader.shard_ranges()]
        counts = [end - begin for begin, end in self.reader.shard_ranges()]
        return [
            ShardInfo(name=name, path=self.path / name, count=count)
            for name, count in zip(names, counts, strict=True)
        ]

    def _crude(self, raw: RawSampleData) -> CrudeSample:
        return CrudeSample({**raw.data[0], "__subflavors__": self.subflavors})

    def as_file_store(self) -> Any:
        """Refuse: records are samples, not files beside them."""
        raise ValueError(f"{self.path}: Arrow shards cannot be an auxiliary data set (`aux`)")

    def config(self) -> dict[str, Any]:
        """Describe the data set to energon."""
        return {
            "type": type(self).__qualname__,
            "_path": str(self.path),
            "fingerprint": self.reader.fingerprint,
            "subset": None if self.subset is None else self.subset.config(),
        }


class _Rows:
    """Records by number, as energon's sample loader asks for them."""

    def __init__(self, path: EPath, reader: ShardReader) -> None:
        self._path, self._reader = path, reader

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, number: int) -> FilteredSample | None:
        """Return a record; None, which energon passes over, for one that cannot be read."""
        shard = self._reader.location(number).shard
        try:
            record = self._reader.record(number)
        except (ValueError, OSError) as error:
            log.warning("record %d of %s is left out: %s", number, self._path, error)
            return None
        source = SourceInfo(
            dataset_path=self._path, index=number, shard_name=shard, file_names=(record.key,)
        )
        return FilteredSample(
            __key__=record.key,
            __shard__=shard,
            __restore_key__=("Webdataset", number),
            __sources__=(source,),
            **{field.name: getattr(record, field.name) for field in fields(Record)},
        )


def plain_path(path: EPath) -> str:
    """Return a data set's path as recipes and ShardReader have it."""
    text = str(path)
    return text if is_remote(text) else str(path.local_path())
