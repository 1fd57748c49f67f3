"""The songs in data/lyrics: whole by the judge, and in one split each."""

import collections
import csv
import unicodedata

import pytest
import reading
import regex

from gemma_sft.curation import romanise
from gemma_sft.tasks.lyrics import task
from gemma_sft.tasks.lyrics import verse

_LANGUAGES = {'hindi': 'DEVANAGARI', 'bengali': 'BENGALI'}
_LEAST = {'hindi': (150, 20, 30), 'bengali': (40, 6, 12)}
_SPLITS = {name: reading.read(f'lyrics/{name}', '.jsonl')
           for name in _LANGUAGES}

languages = pytest.mark.parametrize('name', _LANGUAGES)


def _songs(name):
  return [song for split in _SPLITS[name].values() for song in split]


@languages
def test_splits(name):
  sizes = [len(split) for split in _SPLITS[name].values()]
  assert all(n >= least for n, least in zip(sizes, _LEAST[name]))
  assert sum(sizes) >= {'hindi': 200, 'bengali': 60}[name]
  total = collections.Counter(s.fields['style'] for s in _songs(name))
  assert 6 <= len(total) <= 8
  for split, songs in _SPLITS[name].items():
    judged = reading.judge(task, songs)
    assert judged.metrics['form'] == 1
    # Every song has a refrain or a radif. Lines rhyme and are of one length;
    # lines of shuffled words would score about a half.
    assert all('refrain' in row for row in judged.rows), split
    assert judged.metrics['rhyme'] > 0.55, split
    assert judged.metrics['line_length'] > 0.9, split
    counts = collections.Counter(s.fields['style'] for s in songs)
    for style, n in total.items():
      # Within one song of the exact share.
      share = n * len(songs) / sum(total.values())
      assert abs(counts[style] - share) <= 1, (split, style)
  train, *held_out = _SPLITS[name].values()
  # Songs on one subject in one metre have a similarity of 0.2.
  reading.assert_unlike(*([
      (song.where, reading.ngrams(' '.join(map(
          verse.key, dict.fromkeys(song.fields['lines']))), 3))
      for song in songs] for songs in (sum(held_out, []), train)), 0.4)


@languages
def test_fields_and_lines(name):
  songs, script = _songs(name), _LANGUAGES[name]
  for field in ('id', 'title'):
    reading.assert_unique(song.fields[field] for song in songs)
  # No line is in two songs, nor are the first lines of two songs the same.
  reading.assert_unique(line for song in songs
                        for line in {*map(verse.key, song.fields['lines'])})
  for song in songs:
    assert set(song.fields) == {
        'id', 'title', 'style', 'language', 'lines', 'romanized'}
    assert song.fields['language'] == name.capitalize()
    lines, latin = song.fields['lines'], song.fields['romanized']
    assert 8 <= len(lines) <= 14 and len(lines) == len(latin), song.where
    for native, line in zip(lines, latin):
      place = f'{song.where}: {native}, {line}'
      assert native == unicodedata.normalize('NFC', native).strip(), place
      assert '  ' not in native, place
      assert verse.script_share(native, script) == 1, place
      # Characters of the script, comma and hyphen; no digits or joiners.
      assert regex.fullmatch(
          rf'[\p{{{script.title()}}} ,\-]+', native) and not regex.search(
              r'\p{N}', native), place
      assert not romanise.leftover(line), place
      assert verse.script(line) == 'LATIN', place
      # As many words and about as many syllables (ai and au in hiatus, as in कई
      # and गई, merge in Latin letters).
      assert len(line.split()) == len(native.split()), place
      assert 0 <= verse.syllables(native) - verse.syllables(line) <= 7, place


def test_raw_csv_needs_curation():
  path = reading.FOLDER / 'lyrics' / 'raw.csv'
  with open(path, encoding='utf-8', newline='') as file:
    raw = list(csv.DictReader(file))
  assert len(raw) >= 60
  assert list(raw[0]) == [
      'song_id', 'title', 'poet', 'style', 'language', 'text']
  reading.assert_unique(row['song_id'] for row in raw)

  def n(pattern):
    return sum(bool(regex.search(pattern, row['text'])) for row in raw)

  for least, pattern in ((5, '<[a-z]+[^>]*>'),  # Tags.
                         (3, '&[a-z]+;'),  # Entities.
                         (3, '[♪★☆]'), (3, '  |\t'), (5, '।\n'), (3, '\u200b'),
                         (3, '[\u0958-\u095f]'),  # Composed nukta letters,
                         (20, '[\u0915-\u0939]\u093c'),  # and decomposed ones.
                         (2, 'à[¤¥¦§]'),  # Mojibake.
                         (3, r'^\P{Devanagari}*\p{Latin}{2}')):  # Romanised.
    assert n(pattern) >= least, pattern
  assert n('कमबख़्त|उल्लू का पट्ठा') == 2
  assert sum(not all(row.values()) for row in raw) >= 4
  openings = collections.Counter(
      regex.sub(r'<[^>]*>|[^\p{L}\p{M}]', '', row['text'])[:20] for row in raw)
  assert sum(k > 1 for k in openings.values()) >= 3  # Near-duplicates.
  # It has no held-out song.
  lines = {verse.key(line) for row in raw for line in row['text'].split('\n')}
  for splits in _SPLITS.values():
    for song in (*splits['validation'], *splits['test']):
      assert not lines & {*map(verse.key, song.fields['lines'])}, song.where
