"""Signals that wait: none is lost, none is handled in the block, and the handlers are as before behind it."""

from __future__ import annotations

import signal
import sys
import threading

import pytest

from recipe.gtpo.run.signals import signals_wait

pytestmark = pytest.mark.unit

ENDINGS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers():
    """SystemExit on SIGTERM as in the programs; as it was, behind the test."""
    before = {number: signal.getsignal(number) for number in ENDINGS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "error"), zip(ENDINGS, (KeyboardInterrupt, SystemExit), strict=True))
def test_a_signal_is_handled_behind_the_block(number, error):
    done = []
    before = signal.getsignal(number)
    with pytest.raises(error):
        with signals_wait():
            signal.raise_signal(number)
            done.append("the rest of the block")
        done.append("behind it")
    assert done == ["the rest of the block"] and signal.getsignal(number) is before


def test_also_one_that_reached_another_thread():
    done = []
    with pytest.raises(KeyboardInterrupt), signals_wait():
        thread = threading.Thread(target=lambda: signal.pthread_kill(threading.get_ident(), signal.SIGINT))
        thread.start()
        thread.join()
        done.append("the rest of the block")
    assert done == ["the rest of the block"]


def test_the_blocks_own_error_is_raised_where_no_signal_came():
    with pytest.raises(OSError, match="no such program"), signals_wait():
        raise OSError("no such program")


def test_one_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with signals_wait():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
