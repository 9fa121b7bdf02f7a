"""Export of a trained model as a plain folder for sentence-transformers and transformers.

The folder needs none of our code. It exists under its final name only when it is whole.
"""

from cocoa_dist.export.card import CardInfo, StageInfo
from cocoa_dist.export.folder import export_folder
from cocoa_dist.export.selftest import SelfTestReport, SelfTestVector, check_self_test
from cocoa_dist.export.templates import ImageSettings

__all__ = [
    "CardInfo",
    "ImageSettings",
    "SelfTestReport",
    "SelfTestVector",
    "StageInfo",
    "check_self_test",
    "export_folder",
]
