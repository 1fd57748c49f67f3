"""Requests to stop, in one process; of several: multihost_test."""

import os
import signal

import pytest

from gemma_sft.monitor import stop as stop_lib


def _send(*numbers):
  for number in numbers:
    os.kill(os.getpid(), number)


def test_any_number_of_sigterms_is_one_request():
  with stop_lib.StopRequest(0) as stop:
    assert not stop.requested()
    _send(signal.SIGTERM, signal.SIGTERM, signal.SIGTERM)
    assert stop.requested() and stop.cause == 'signal'
    assert stop.reason(3, 9).startswith('stopped by SIGTERM after 3 of 9')


@pytest.mark.parametrize('before', ((), (signal.SIGTERM,)))
def test_a_second_interrupt_ends_at_once(before):
  with stop_lib.StopRequest(0) as stop:
    _send(*before, signal.SIGINT)
    assert stop.requested()
    with pytest.raises(KeyboardInterrupt):
      _send(signal.SIGINT)


def test_the_deadline_is_a_cause_of_its_own_and_handlers_are_put_back():
  before = signal.getsignal(signal.SIGTERM)
  with stop_lib.StopRequest(1e-9) as stop:
    assert signal.getsignal(signal.SIGTERM) != before
    assert stop.requested() and stop.cause == 'deadline'
    _send(signal.SIGTERM)
    assert stop.requested() and stop.cause == 'signal'
  assert signal.getsignal(signal.SIGTERM) == before
