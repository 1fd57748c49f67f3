"""What a long stage prints, with a clock of the test's own."""

import io

import pytest

from gemma_sft import progress


class _Terminal(io.StringIO):

  def isatty(self):
    return True


def _printed(file, *times_and_done):
  """Returns what is printed, in a stage of 60 that begins at time 100."""
  times = iter((100, *(time for time, _ in times_and_done)))
  show = progress.Progress(
      60, 'answered', file=file, clock=lambda: next(times))
  for _, done in times_and_done:
    show(done)
  return file.getvalue()


def test_a_quick_stage_prints_nothing():
  assert not _printed(io.StringIO(), (101, 20), (109.9, 60))


_SLOW = (105, 5), (111, 15.5), (115, 20), (130, 30), (160, 60)


def test_a_log_has_a_line_every_ten_seconds():
  assert _printed(io.StringIO(), *_SLOW) == (
      '  15/60 answered | 32 s left\n'  # 11 s * (60 / 15.5 - 1) = 31.6 s
      '  30/60 answered | 30 s left\n'
      '  60/60 answered | 1 m 00 s\n')


def test_a_terminal_has_one_line():
  text = _printed(_Terminal(), *_SLOW)
  assert text.count('\n') == 1 and text.endswith('60/60 answered | 1 m 00 s\n')
  assert text.count('\r') == 3


def test_without_a_first_unit_the_time_so_far_is_shown():
  assert _printed(io.StringIO(), (112, 0)) == '  0/60 answered | 12 s so far\n'


@pytest.mark.parametrize('seconds, text', (
    (0, '0 s'), (11.6, '12 s'), (59.4, '59 s'), (59.6, '1 m 00 s'),
    (200, '3 m 20 s'), (3599.6, '1 h 00 m'), (7500, '2 h 05 m'),
    (100_000, '27 h 46 m')))
def test_duration(seconds, text):
  assert progress.duration(seconds) == text
