"""A trained monodecoder run, for all tests that only read it."""

import pytest

from gdyn.inference import Run
from tests.engines.monodecoder_run import trained_run


@pytest.fixture(scope="session")
def monodecoder_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained_run(tmp_path_factory.mktemp("monodecoder"))
