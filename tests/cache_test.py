import pytest

from gemma_sft import cache


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'file'
  with cache.replacing(path) as partial:
    partial.write_text('first')
    assert not path.exists()
  assert path.read_text() == 'first'
  with pytest.raises(KeyError):
    with cache.replacing(path) as partial:
      partial.write_text('half')
      raise KeyError
  assert path.read_text() == 'first'
  assert list(tmp_path.iterdir()) == [path]
