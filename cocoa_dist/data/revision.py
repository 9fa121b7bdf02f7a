"""What a data set was mined from, and whether that is still what it was."""

from collections.abc import Mapping
from typing import Any

from cocoa_dist.data.shard_format import DatasetInfo, read_manifest
from cocoa_dist.data.store import open_store

MINED = "mined"  # in a manifest's info, and in the meta of records: where negatives are from


def check_origin(info: DatasetInfo, location: str) -> None:
    """Raise ValueError if hard negatives were mined from another revision of their data.

    Data that is no longer where it was says nothing.
    """
    mined: Mapping[str, Any] = info.info.get(MINED, {})
    if not mined:
        return
    try:
        now = read_manifest(open_store(str(mined["location"])))["fingerprint"]
    except (ValueError, OSError):
        return
    if now != mined["data"]:
        raise ValueError(
            f"{location}: its hard negatives were mined from revision {str(mined['data'])[:12]} of "
            f"{mined['location']}, which is now {now[:12]}: mine them again "
            "(tools/mine_hard_negatives.py), or restore the data set"
        )
