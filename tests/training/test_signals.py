"""Signals as requests: who takes them, who is told, and what is as before."""

import os
import signal
import threading
import time

import pytest

from hintjax.experiments import comparison as compare
from hintjax.training import signals
from hintjax.training.signals import stoppable

pytestmark = pytest.mark.quick


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(autouse=True)
def as_before():
    before = handlers()
    yield
    assert handlers() == before


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (signal.SIGINT, KeyboardInterrupt, "all of it"),
        (signal.SIGTERM, SystemExit, 143),
    ],
)
def test_a_signal_is_heeded_when_all_is_saved(number, error, code):
    saved = []
    with pytest.raises(error) as ended, stoppable() as request:
        request.obey("nothing was asked")
        os.kill(os.getpid(), number)
        saved.append(True)
        request.obey("all of it")
        saved.append(False)
    assert saved == [True]
    assert ended.value.args == (code,)


def test_one_that_comes_last_is_not_forgotten():
    with pytest.raises(SystemExit), stoppable():
        signal.raise_signal(signal.SIGTERM)


def test_the_second_one_acts_at_once_unless_both_were_sent_together(monkeypatch):
    with pytest.raises(KeyboardInterrupt) as ended, stoppable() as request:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # a supervisor that sends it twice
        monkeypatch.setattr(signals, "_PATIENCE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        request.obey("saved")
    assert ended.value.args == ("saved",)


def test_what_is_ignored_stays_so_and_the_callers_handler_is_called_last():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(len(calls)))
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit), stoppable() as request:
            signal.raise_signal(signal.SIGINT)
            assert request.signal is None
            signal.raise_signal(signal.SIGTERM)
            assert calls == []
            request.obey("")
        assert calls == [0]
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def test_only_the_main_thread_takes_signals_and_its_threads_are_told():
    seen = []

    def loop(expected):
        before = handlers()
        with stoppable() as request:
            seen.append(request is expected and handlers() == before)

    def run(expected):
        thread = threading.Thread(target=loop, args=(expected,))
        thread.start()
        thread.join()

    with stoppable() as outer, stoppable() as inner:
        assert inner is outer
        run(outer)
    assert seen == [True]
    run(None)  # alone, it has a request that nobody makes
    assert seen == [True, False]


def test_a_comparison_ends_all_of_its_runs():
    ended = []

    def one(job):
        with stoppable() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(500):
                time.sleep(0.01)
                try:
                    request.obey("saved")
                except SystemExit:
                    ended.append(job)
                    raise

    with pytest.raises(SystemExit) as stopped:
        compare.side_by_side(one, [(job,) for job in range(9)], 2)
    assert stopped.value.code == 143
    assert 1 <= len(ended) < 9  # the others were not begun
