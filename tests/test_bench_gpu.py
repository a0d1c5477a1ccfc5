"""`make bench-gpu` without a GPU: every section runs at small sizes and gives plain data."""

import json

import pytest

from benchmarks import gpu


@pytest.mark.slow
def test_every_section_runs(tmp_path):
    out = tmp_path / "found.json"
    assert gpu.main(["--rehearse", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert not found["failed"]
    assert not found["skipped"]
    for report in found["errors"]:
        assert all(e["coda"] <= e["torch"] for e in report["outputs"])
    for model in gpu.LAYERS:
        ways = {"coda", "coda, speed", "eager", "inductor"}
        assert found["layers"][model]["step ms"].keys() == ways
        assert found["layers"][model]["forward ms"].keys() >= {"coda", "gemms alone"}


def test_a_section_that_fails_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Bench, "rows", lambda self: 1 // 0)
    out = tmp_path / "found.json"
    assert gpu.main(["--rehearse", "--out", str(out), "--only", "rows", "ceilings"]) == 1
    found = json.loads(out.read_text())
    assert "ZeroDivisionError" in found["failed"]["rows"]
    assert "tflops" in found["ceilings"]


def test_without_a_gpu_there_are_no_times(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "gpu_target", lambda: None)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "no Hopper or Blackwell GPU" in capsys.readouterr().err
