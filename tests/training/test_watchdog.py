"""The watchdog: one limit for steps, one for what is done between them. Real ranks: tests/distributed/test_faults.py."""

import threading

import pytest

from mmcontrast.training import watchdog as module
from mmcontrast.training.watchdog import EXIT_CODE, Watchdog


@pytest.fixture
def ended(monkeypatch):
    """An event that is set where the process would end, which it does not."""
    event = threading.Event()

    def end(code):
        assert code == EXIT_CODE
        event.set()
        raise SystemExit

    monkeypatch.setattr(module, "end_now", end)
    monkeypatch.setattr(module, "GRACE", 0.0)
    monkeypatch.setattr(module.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    return event


def test_a_pause_that_does_not_end_is_a_stall(ended, tmp_path, capsys):
    with Watchdog(3600.0, tmp_path, 0, 1, pause_seconds=0.2) as watchdog:
        watchdog.move(6, "training")
        with watchdog.away("saving"):
            assert ended.wait(60)
    told = capsys.readouterr().err
    assert "stalled: no end of saving, evaluating or mining for 0 s (train.pause_stall_seconds)" in told
    assert "step 7, rank 0 on" in told and ": saving for" in told
    assert "ended.wait(60)" in (tmp_path / "stalled" / "rank-00000.txt").read_text()


def test_a_step_after_a_pause_has_its_own_limit_again(ended, tmp_path, capsys):
    with Watchdog(2.0, tmp_path, 0, 1, pause_seconds=3600.0) as watchdog:
        with watchdog.away("evaluating"):
            assert not ended.wait(2.5), "a pause may be longer than a step"
        watchdog.move(7, "waiting for a batch")
        assert ended.wait(60)
    told = capsys.readouterr().err
    assert "stalled: no step for 2 s (train.stall_seconds)" in told and "step 8" in told


def test_no_limit_of_pauses_is_none(ended, tmp_path):
    with Watchdog(2.0, tmp_path, 0, 1) as watchdog, watchdog.away("saving"):
        assert not ended.wait(2.5)
