"""Answers on disk survive a kill and are found by what decides them."""

from gemma_sft.generation import answers


def test_kept_and_found(tmp_path):
  path = tmp_path / 'deep' / 'answers.jsonl'
  kept = answers.Answers(str(path))
  assert kept.find('a') is None and not path.exists()
  kept.add('a', 'भात\nsecond line')
  # On disk before the next answer is made.
  assert answers.Answers(str(path)).find('a') == 'भात\nsecond line'
  kept.add('b', '')
  kept.close()
  again = answers.Answers(str(path))
  assert again.find('b') == ''
  assert path.read_text('utf-8').count('\n') == 2


def test_a_kill_in_the_middle_of_a_line_costs_that_line(tmp_path):
  path = tmp_path / 'answers.jsonl'
  kept = answers.Answers(str(path))
  for key in 'abc':
    kept.add(key, key * 3)
  kept.close()
  path.write_bytes(path.read_bytes()[:-5])
  again = answers.Answers(str(path))
  assert [again.find(k) for k in 'abc'] == ['aaa', 'bbb', None]
  again.add('d', 'ddd')
  again.close()
  last = answers.Answers(str(path))
  assert [last.find(k) for k in 'abcd'] == ['aaa', 'bbb', None, 'ddd']


def test_keys():
  key = answers.make_key('w', [1, 2, 3], 64)
  assert key == answers.make_key('w', (1, 2, 3), 64)
  others = [answers.make_key(*parts) for parts in (
      ('w', [1, 2], 64), ('v', [1, 2, 3], 64), ('w', [1, 2, 3], 65),
      ('w', '123', 64), ('w', [12, 3], 64))]
  assert len({key, *others}) == 6
