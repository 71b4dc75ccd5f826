"""A signal sets a flag or stops the run. The tests send real signals to this process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from signal import SIGINT, SIGTERM, SIGUSR1, SIGUSR2

import pytest

from gsdg.utils.stop_signals import NOTHING_SAVED, Signals, Stopped, end


@pytest.fixture(autouse=True)
def handlers_are_put_back():
    signal.signal(SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    before = {number: signal.getsignal(number) for number in (SIGINT, SIGTERM, SIGUSR1, SIGUSR2)}
    yield
    left = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert left == before


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def deferring(**kinds) -> Signals:
    signals = Signals(**kinds)
    signals.defer()
    return signals


@pytest.mark.parametrize("number", [SIGINT, SIGTERM, SIGUSR1, SIGUSR2])
def test_a_signal_to_stop_asks_for_one_checkpoint(number):
    with deferring() as signals:
        assert signals.stop is None
        assert not signals.take_save()
        send(number)
        assert signals.stop == number
        assert [signals.take_save(), signals.take_save()] == [True, False]
        assert signals.stop == number


def test_a_signal_to_save_asks_for_a_checkpoint_but_not_to_stop():
    with Signals(stop=(SIGUSR2,), save=(SIGTERM,)) as signals:  # whether deferred or not
        send(SIGTERM)
        assert signals.stop is None
        assert [signals.take_save(), signals.take_save()] == [True, False]
        signals.defer()
        send(SIGTERM, SIGTERM)
        assert [signals.take_save(), signals.take_save()] == [True, False]


def test_the_first_signal_to_stop_is_the_one_that_is_reported():
    with deferring() as signals:
        send(SIGUSR2, SIGTERM, SIGUSR2)
        assert signals.stop is SIGUSR2


def test_a_signal_before_defer_stops_at_once_and_only_once():
    with Signals() as signals:
        with pytest.raises(Stopped, match="SIGTERM: .*nothing had to be saved") as stopped:
            send(SIGTERM)
        send(SIGUSR2)  # while the run records the stop
    assert (stopped.value.signal, stopped.value.message) == (SIGTERM, NOTHING_SAVED)
    assert signals.stop is SIGTERM


def test_a_second_ctrl_c_stops_at_once_but_another_second_signal_does_not():
    with deferring() as signals:
        send(SIGTERM, SIGTERM, SIGUSR2, SIGUSR2, SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(SIGINT)
    assert signals.stop is SIGTERM


def test_a_line_says_what_happens_next(capfd):
    with deferring(stop=(SIGINT,), save=(SIGTERM,)):
        send(SIGINT, SIGTERM)
    assert (
        capfd.readouterr().err
        == "SIGINT: saving after this step (again to stop at once)\nSIGTERM: saving after this step\n"
    )


def test_ignored_signals_stay_ignored_and_handlers_of_other_libraries_stay():
    heard = []
    signal.signal(SIGUSR1, signal.SIG_IGN)
    signal.signal(SIGUSR2, lambda number, frame: heard.append(number))
    with deferring() as signals:
        send(SIGUSR1, SIGUSR2)
        assert signals.stop is None
        assert not signals.take_save()
    assert heard == [SIGUSR2]
    assert signal.getsignal(SIGUSR1) is signal.SIG_IGN
    for number in (SIGUSR1, SIGUSR2):
        signal.signal(number, signal.SIG_DFL)


def test_outside_the_main_thread_no_handler_is_installed():
    before, seen = signal.getsignal(SIGTERM), []

    def work():
        with Signals():
            seen.append(signal.getsignal(SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def load() -> None:
    signal.signal(SIGTERM, signal.SIG_DFL)  # as torch's data loader workers do
    time.sleep(60)


def test_signals_are_blocked_in_child_processes_forked_inside():
    fork = multiprocessing.get_context("fork")
    before, inside, after = (fork.Process(target=load, daemon=True) for _ in range(3))
    before.start()
    with Signals(stop=(SIGUSR2, SIGINT), save=(SIGTERM,)):
        inside.start()
        time.sleep(0.1)
        for number in (SIGTERM, SIGUSR2, SIGINT):
            os.kill(inside.pid, number)
        inside.join(0.3)
        assert inside.is_alive()
    inside.join(5)
    assert inside.exitcode == -signal.SIGKILL  # it was not joined inside; at exit Python would wait for it forever
    assert before.is_alive()
    after.start()
    for process in (before, after):
        process.terminate()
        process.join(5)
        assert process.exitcode == -SIGTERM


def test_the_program_ends_as_the_signal_would_have_done():
    with pytest.raises(KeyboardInterrupt):
        end(SIGINT)
    with pytest.raises(SystemExit) as ending:
        end(SIGTERM)
    assert ending.value.code == 143
