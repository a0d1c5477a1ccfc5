"""Golden texts: what a pass prints, kept beside its test; `--update-golden` writes them anew."""

import os
import zlib
from datetime import date
from pathlib import Path

import pytest
from hypothesis import settings

# A machine may be busy: no test is about time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


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


# Sweeps take a share that rotates by the day; all processes of one run have one seed.
os.environ.setdefault("CODA_SWEEP_SEED", str(date.today().toordinal()))
os.environ.setdefault("CODA_SWEEP_SHARES", "4")


def pytest_report_header():
    return " ".join(f"{k}={os.environ[k]}" for k in ("CODA_SWEEP_SEED", "CODA_SWEEP_SHARES"))


def in_share(nodeid):
    """Whether a slow test is one of this run's share, by its name and the seed."""
    seed, shares = (int(os.environ[f"CODA_SWEEP_{k}"]) for k in ("SEED", "SHARES"))
    return zlib.crc32(nodeid.encode()) % shares == seed % shares


def is_named(config, item):
    """Whether the command line names a test or its file, and not a folder of tests."""
    return any(
        item.nodeid.startswith(str(a)) and ".py" in str(a) for a in config.invocation_params.args
    )


def pytest_collection_modifyitems(config, items):
    """Slow tests run by shares; those marked `gpu` are skipped where no GPU can run them.

    A test that the command line names, or whose file it names, always runs.
    """
    left_out = [
        i
        for i in items
        if i.get_closest_marker("slow") and not in_share(i.nodeid) and not is_named(config, i)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [i for i in items if i not in set(left_out)]
    from coda.runtime.call import gpu_target

    missing = [i for i in items if i.get_closest_marker("gpu")]
    if missing and gpu_target() is None:
        for item in missing:
            item.add_marker(pytest.mark.skip(reason="no Hopper or Blackwell GPU"))
