"""A request to stop is noticed at once, from wherever it comes, and kills nothing."""

import subprocess
import sys
import threading
import time

from trainer.stop import StopRequest

_IMPORTS = """import ctypes, os, signal, sys, threading, time
from trainer.stop import STOP_SIGNALS, StopRequest
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
"""


def _python(code: str) -> str:
    """Output of code in a process of its own: signals are a process's."""
    ran = subprocess.run([sys.executable, "-c", _IMPORTS + code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, (ran.returncode, ran.stderr)
    return ran.stdout.strip()


def _wait_for_reason(stop: StopRequest) -> str:
    deadline, poll = time.monotonic() + 10, threading.Event()
    while not stop.reason and time.monotonic() < deadline:
        poll.wait(0.002)
    return stop.reason


def test_each_signal_is_noticed_while_the_main_thread_is_inside_c() -> None:
    noticed = _python(
        """
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)  # all zero: PTHREAD_MUTEX_INITIALIZER
noticed = []
def look(stop, number, held):
    libc.pthread_mutex_lock(mutex)
    held.set()
    time.sleep(0.05)  # by now the main thread waits for the mutex, which no signal interrupts
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not stop.reason and time.monotonic() < deadline:
        time.sleep(0.001)
    noticed.append(stop.reason or "too late")
    libc.pthread_mutex_unlock(mutex)
for number in STOP_SIGNALS:
    stop, held = StopRequest(), threading.Event()
    stop.install()
    thread = threading.Thread(target=look, args=(stop, number, held))
    thread.start()
    held.wait()
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_unlock(mutex)
    thread.join()
print(*noticed)
"""
    )
    assert noticed == "SIGTERM SIGINT SIGUSR1 SIGUSR2 SIGHUP"


def test_a_signal_that_came_while_all_were_blocked_is_noticed_after_install() -> None:
    reason = _python(
        """
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
os.kill(os.getpid(), signal.SIGUSR1)
stop = StopRequest()
stop.install()
print(stop.reason, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""
    )
    assert reason == "SIGUSR1 set()"


def test_ten_thousand_signals_at_once_do_no_harm_and_the_first_is_the_reason() -> None:
    reason = _python(
        """
stop = StopRequest()
stop.install()
for _ in range(2500):
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(os.getpid(), number)
print(stop.reason)
for _ in range(100):
    os.kill(os.getpid(), signal.SIGTERM)
"""
    )
    assert reason == "SIGUSR2"


def test_other_signals_and_children_that_end_ask_for_nothing() -> None:
    reason = _python(
        """
stop = StopRequest()
stop.install()
signal.signal(signal.SIGCHLD, lambda *_: None)
signal.signal(signal.SIGALRM, lambda *_: None)
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
os.kill(os.getpid(), signal.SIGALRM)
stop.limit_minutes(None)
print(repr(stop.reason))
"""
    )
    assert reason == "''"


def test_a_forked_process_survives_signals_and_does_not_pass_them_on() -> None:
    outcome = _python(
        """
stop = StopRequest()
stop.install()
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.read(reading, 1)
    os._exit(7)
for number in STOP_SIGNALS:
    os.kill(child, number)
os.write(writing, b"-")
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(code, repr(stop.reason), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""
    )
    assert outcome == "7 '' set()"


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    reason = _python(
        """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
stop = StopRequest()
stop.install()
os.kill(os.getpid(), signal.SIGHUP)
print(repr(stop.reason))
"""
    )
    assert reason == "''"


def test_a_time_limit_counts_from_the_start_and_the_first_one_holds() -> None:
    stop = StopRequest()
    stop.limit_minutes(1e-6)
    stop.limit_minutes(1000.0)
    assert _wait_for_reason(stop) == "time limit"


def test_an_attempt_that_began_without_a_time_limit_has_none() -> None:
    stop = StopRequest()
    stop.limit_minutes(None)
    stop.limit_minutes(0.0)
    assert stop.reason == "" and "stop" not in [thread.name for thread in threading.enumerate() if not thread.daemon]


def test_steps_left_are_counted_over_the_runs_of_an_attempt() -> None:
    stop = StopRequest()
    assert stop.may_take(10) == 10
    stop.took(4)
    assert stop.may_take(None) == 6
