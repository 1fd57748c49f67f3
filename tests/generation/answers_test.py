"""The cache of answers survives a kill; a key tells answers apart."""

import pytest

from gemma_sft.generation import answers


def test_an_answer_is_on_disk_at_once(tmp_path):
  path = tmp_path / 'deep' / 'answers.jsonl'
  first = answers.Answers(str(path))
  assert not path.exists()
  first.add('a', 'भात\nsecond line')
  assert _read(path) == {'a': 'भात\nsecond line'}
  first.add('b', '')
  first.close()
  assert _read(path) == {'a': 'भात\nsecond line', 'b': ''}
  assert path.read_text('utf-8').count('\n') == 2


def _read(path):
  return answers.Answers(str(path))._answers


def test_a_kill_in_the_middle_of_a_line_costs_that_line(tmp_path):
  path = tmp_path / 'answers.jsonl'
  first = answers.Answers(str(path))
  for key in 'abc':
    first.add(key, key * 3)
  first.close()
  path.write_bytes(path.read_bytes()[:-5])
  assert _read(path) == {'a': 'aaa', 'b': 'bbb'}
  again = answers.Answers(str(path))
  again.add('d', 'ddd')
  again.close()
  assert _read(path) == {'a': 'aaa', 'b': 'bbb', 'd': 'ddd'}


@pytest.mark.parametrize('on_disk', (True, False))
def test_complete_makes_what_is_missing_once(tmp_path, on_disk):
  path = str(tmp_path / 'answers.jsonl') if on_disk else ''
  cached = answers.Answers(path)
  cached.add('b', 'known')
  asked, counts = [], []

  def answer(indices, keep, report):
    asked.append(indices)
    for n, i in enumerate(reversed(indices)):  # In any order.
      report(n + 0.5)
      keep(i, f'answer {i}')

  expected = ['answer 0', 'known', 'answer 0', 'answer 3']
  for _ in range(2):
    assert cached.complete('abac', answer, counts.append) == expected
  assert asked == [[0, 3]] and counts == [2.5, 3.5]
  cached.close()
  assert _read(path).get('c') == ('answer 3' if on_disk else None)


def test_an_interrupted_complete_keeps_what_it_has(tmp_path):
  path = str(tmp_path / 'answers.jsonl')

  def interrupted(indices, keep, report):
    del report
    keep(indices[0], 'first')
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    answers.Answers(path).complete('ab', interrupted)
  rest = []
  assert answers.Answers(path).complete(
      'ab', lambda indices, keep, _: (rest.extend(indices), keep(1, 'x'))) == [
          'first', 'x']
  assert rest == [1]


def test_keys():
  key = answers.make_key('w', [1, 2, 3], 64)
  assert key == answers.make_key('w', (1, 2, 3), 64)
  others = [answers.make_key(*parts) for parts in (
      ('w', [1, 2], 64), ('v', [1, 2, 3], 64), ('w', [1, 2, 3], 65),
      ('w', '123', 64), ('w', [12, 3], 64))]
  assert len({key, *others}) == 6
