import shutil
from pathlib import Path

import pytest
from synthetic_run import write_run


@pytest.fixture(scope="session")
def measured_run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def run_dir(measured_run, tmp_path) -> Path:
    """A finished run that a test may change."""
    return Path(shutil.copytree(measured_run, tmp_path / "tiny"))
