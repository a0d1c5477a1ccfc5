"""The kernel cache: across processes, in bad weather."""

import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time

import pytest

from coda.cli import main
from coda.lowering.program.target import DEFAULT
from coda.runtime import cache, settings
from coda.runtime.compile import compiling_environment

COMPILE = textwrap.dedent(
    """
    import sys, time
    import coda
    from coda.lowering.algebra.policy import DEFAULT_POLICY
    from coda.lowering.program.target import DEFAULT
    from coda.runtime.compile import Job, compile_job

    TEXT = '''
    block f(%x: [M, D] bf16) {
      %0 = square %x
      %1 = mean %0 axis -1
      return out = %1
    }
    '''
    job = Job(TEXT, (("M", 8), ("D", 256)), DEFAULT, False, DEFAULT_POLICY, "rows0")
    start = time.monotonic()
    done = compile_job(job)
    print(time.monotonic() - start, done.cubin.exists(), done.source.name)
    """
)


def environment_for(directory):
    """The variables of a process that compiles, and keeps what it compiles in a directory."""
    with settings.CACHE_DIR.as_given(str(directory)):
        return compiling_environment(DEFAULT)


def run(directory, **more):
    environment = {**os.environ, **environment_for(directory), **more}
    return subprocess.Popen(
        [sys.executable, "-c", COMPILE], env=environment, stdout=subprocess.PIPE, text=True
    )


def objects(directory):
    return sorted(directory.rglob("*.o"))


@pytest.mark.slow
def test_two_processes_compile_a_kernel_once_and_a_third_loads_it(tmp_path):
    both = [run(tmp_path), run(tmp_path)]
    outputs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert len(objects(tmp_path)) == 1
    written = objects(tmp_path)[0].stat().st_mtime_ns
    third = run(tmp_path)
    outputs.append(third.communicate(timeout=120)[0])
    assert objects(tmp_path)[0].stat().st_mtime_ns == written
    assert len({o.split()[2] for o in outputs}) == 1


@pytest.mark.slow
def test_a_directory_that_was_copied_elsewhere_has_its_kernels(tmp_path):
    run(tmp_path / "here").communicate(timeout=120)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    (tmp_path / "there").chmod(0o700)
    (written,) = objects(tmp_path / "there")
    before = written.stat().st_mtime_ns
    run(tmp_path / "there").communicate(timeout=120)
    assert objects(tmp_path / "there") == [written]
    assert written.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_corrupt_object_is_compiled_again(tmp_path):
    run(tmp_path).communicate(timeout=120)
    (found,) = objects(tmp_path)
    good = found.stat().st_size
    found.write_bytes(b"not an object file")
    again = run(tmp_path)
    again.communicate(timeout=120)
    assert again.returncode == 0
    (found,) = objects(tmp_path)
    assert found.stat().st_size > good // 2


@pytest.mark.slow
def test_a_killed_compile_breaks_nothing(tmp_path):
    first = run(tmp_path)
    while first.poll() is None and not list(tmp_path.rglob("*.lock")):
        time.sleep(0.01)
    first.kill()  # it holds the lock and compiles
    first.communicate()
    assert not objects(tmp_path)
    second = run(tmp_path)
    second.communicate(timeout=120)
    assert second.returncode == 0
    assert len(objects(tmp_path)) == 1


def test_the_directory_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("CODA_CACHE_DIR", str(tmp_path / "new"))
    path = cache.cache_directory()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_directory_that_cannot_be_made_gives_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CODA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        path = cache.cache_directory()
    assert path.is_dir()
    assert cache.cache_directory() == path


def test_the_command_line_shows_and_clears_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CODA_CACHE_DIR", str(tmp_path))
    (cache.object_directory() / "a.o").write_bytes(b"x" * 1500)

    def coda(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["cache", *arguments])
        assert not stopped.value.code
        return capsys.readouterr().out

    assert coda("path").strip() == str(tmp_path)
    assert "1.5 kB" in coda("ls")
    assert coda("size").startswith("1 kernels, 0.0 MB of at most")
    assert coda("prune") == "0 deleted\n"
    coda("clear")
    assert coda("ls").startswith("0 kernels")


def test_the_oldest_objects_go_first(tmp_path, monkeypatch):
    monkeypatch.setenv("CODA_CACHE_DIR", str(tmp_path))
    directory = cache.object_directory()
    for i in range(4):
        path = directory / f"{i}.o"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 + i, 1000 + i))
    assert cache.prune(limit=250) == 2
    assert [p.name for p in objects(directory)] == ["2.o", "3.o"]
