"""Settings that must hold before anything imports torch, and the ranks harness as a fixture."""

import os

import pytest

from tests import harness

# The tests start their own ranks: whoever started pytest is none of their business.
_environment = harness.clean_environment()
for _name in os.environ.keys() - _environment.keys():
    del os.environ[_name]
os.environ.update(_environment)


@pytest.fixture(scope="session")
def run_ranks():
    """`harness.run_ranks` with its server warm, so that no test's time limit pays for imports."""
    harness.warm_up()
    return harness.run_ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that wait longest come first, so that the others are done meanwhile where two run at a time."""
    items.sort(key=lambda item: item.path.name not in ("test_slurm.py", "test_rank_failures.py", "test_resume.py"))
