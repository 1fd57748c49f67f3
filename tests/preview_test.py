"""What is shown as trained is what is trained."""

import re

import conftest
import pytest

from gemma_sft import errors
from gemma_sft import preview


@pytest.fixture
def three(config, tmp_path):
  config.data.update(
      train=conftest.write_pairs(tmp_path / 'three.txt', [
          ('Who?', 'Me.'), ('What is <end_of_turn>?', 'A tag.'),
          ('Why so long?', 'word ' * 9)]),
      max_length=96)
  return config


def _preview(config, **changes):
  return preview.main(
      config, **dict(split='train', examples=3, color=False) | changes)


def test_what_is_trained_and_how_much(three, capsys):
  assert _preview(three) == 0
  out = capsys.readouterr().out
  assert re.findall('«(.*?)»', out, re.DOTALL) == [
      'Me.<end_of_turn>', 'A tag.<end_of_turn>',
      'word ' * 8 + 'word<end_of_turn>']
  # All of the prompt is shown, and a user's tag as its characters.
  assert ('<start_of_turn>user\nWho?<end_of_turn>\n'
          '<start_of_turn>model\n«') in out
  assert 'What is <end_of_turn>?<end_of_turn>' in out
  assert '1 with control-token text' in out and 'three.txt:1: ' in out
  header = re.findall(r'three.txt:\d+: (\d+) tokens, (\d+) trained', out)
  assert len(header) == 3
  # 'M', 'e', '.' and the tag.
  assert header[0][1] == '4'
  totals = re.search(r'audit: train: 3 examples, (\d+) tokens, (\d+) trained',
                     out)
  assert int(totals[1]) == sum(int(n) for n, _ in header)
  assert int(totals[2]) == sum(int(n) for _, n in header)
  bars = re.findall(r'^ +(\d+) to +(\d+) +(\d+)', out, re.MULTILINE)
  assert sum(int(count) for *_, count in bars) == 3
  assert int(bars[0][0]) == min(int(n) for n, _ in header)
  assert re.search(r'fertility of the trained text: \d\.\d\d tokens per', out)


def test_colours_and_another_split(three, capsys):
  _preview(three, examples=1, color=True)
  out = capsys.readouterr().out
  assert '\x1b[32mMe.<end_of_turn>\x1b[0m' in out and '«' not in out
  _preview(three, split='validation')
  assert 'audit: validation: 2 examples' in capsys.readouterr().out


@pytest.mark.parametrize('lengths, counts', [
    ([5], [1]), ([3, 3, 3], [3]), (list(range(10)), [1] * 10),
    ([1, 11, 11, 12], None), (list(range(1, 1001)), [100] * 10)])
def test_histogram_counts_every_example_once(lengths, counts):
  text = preview.histogram(lengths)
  found = [int(n) for n in re.findall(r'to +\d+ +(\d+)', text)]
  assert sum(found) == len(lengths)
  if counts:
    assert found == counts
  assert f'longest {max(lengths)}' in text


def test_training_data_is_the_default(three):
  three.data.test = three.data.validation  # What `evaluate` would take.
  status, out, err = conftest.run_module('preview', *conftest.flags(three))
  assert status == 0, err
  assert 'audit: train: 3 examples' in out


@pytest.mark.parametrize('changes, match', (
    (dict(split='test'), '--split=test'),
    (dict(split='tarin'), '--split=tarin'),
    (dict(examples=-1), '--examples=-1'),
    (dict(), 'no records in')))
def test_what_makes_no_sense_is_refused(three, tmp_path, changes, match):
  if not changes:
    (tmp_path / 'three.txt').write_text('')
  with pytest.raises(errors.UserError, match=match):
    _preview(three, **changes)
