"""Everything in this folder needs a GPU: marked `gpu`, and skipped with one reason where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
REASON = "no CUDA device"


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else REASON
    return f"gpu tests: {device}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=REASON))
