"""Golden texts: what a pass prints, kept beside its test; `--update-golden` writes them anew."""

import os
from datetime import date
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write golden files anew")


@pytest.fixture
def golden(request):
    """golden(name, text): compare with the file golden/name beside the test."""

    def compare(name, text):
        path = Path(request.fspath).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"no golden file {path}: run pytest --update-golden"
        assert text == path.read_text()

    return compare


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory):
    """Kernels compiled by tests are kept apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CODA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def settings_outlive_nothing(cache_directory):
    """What a call sets for itself in the environment ends with it."""

    def ours():
        return {k: v for k, v in os.environ.items() if k.startswith("CODA_")}

    before = ours()
    yield
    assert ours() == before


# Long sweeps take a share that rotates by the day; processes of one run have one seed.
os.environ.setdefault("CODA_SWEEP_SEED", str(date.today().toordinal()))


def pytest_report_header():
    return f"CODA_SWEEP_SEED={os.environ['CODA_SWEEP_SEED']}"


@pytest.fixture(scope="session")
def sweep_seed():
    """The number by which a long sweep takes its share; the report's header records it."""
    return int(os.environ["CODA_SWEEP_SEED"])


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is no GPU that coda compiles for."""
    from coda.runtime.run import gpu_arch

    missing = [i for i in items if i.get_closest_marker("gpu")]
    if missing and gpu_arch() is None:
        for item in missing:
            item.add_marker(pytest.mark.skip(reason="no Hopper or Blackwell GPU"))
