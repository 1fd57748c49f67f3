"""The curation command: every row and every change is accounted for."""

import collections
import csv
import json
import random
import re

import conftest
import hypothesis
from hypothesis import strategies as st
import pytest

from configs import curation
from gemma_sft import curate
from gemma_sft import errors
from gemma_sft.inputs import records

_OPENINGS = ('<p>दिल की बात<br>कहे कौन</p>', 'नदी  चली\nनाव चली',
             'শিউলি ফুল\nভোরের আলো', 'rain on\nthe roof',
             'lamp &amp; road\nlong')
_NAMES = ('train', 'validation', 'test')
_ON = st.booleans()
_CELLS = st.sampled_from(
    ['', ' ', 'a b c', 'a b c!', '<b>a b c</b>', 'क\nख।', 'one\ntwo\nthree',
     '♪', 'a long line of some words', 'a long line of some wordz', 'damn it'])


@pytest.fixture
def source(tmp_path):
  """A raw CSV: 40 songs of ten poets, a copy, an empty one, a poet missing."""
  path = tmp_path / 'raw.csv'
  rng = random.Random(0)

  def line():
    return ' '.join(''.join(rng.choices('abcdefghijklmnop', k=5))
                    for _ in range(4))

  rows = [[f's{i}', f'p{i // 4}', ('folk', 'film')[i % 2],
           '\n'.join([_OPENINGS[i % 5], *(line() for _ in range(6))])]
          for i in range(40)]
  rows[5][1] = ' '
  rows += [['s5', rows[4][1], 'film', rows[5][3].replace('\n', ' \n')],
           ['s41', 'p1', 'folk', ''], ['s42', 'p2', 'folk', 'one line']]
  with open(path, 'w', encoding='utf-8', newline='') as file:
    csv.writer(file).writerows([['song', 'poet', 'style', 'text'], *rows])
  return path


@pytest.fixture
def config(source):
  config = curation.get_config()
  config.update(source=str(source), text=('text',), required=('text',),
                min_lines=3, fill='poet=song', balance='style',
                groups=('song', 'poet'), romanise=('text',), opening=0)
  return config


def _kept(files):
  return [row for name in _NAMES for row in files[f'{name}.jsonl']]


def _run(config, out, **kwargs):
  assert curate.main(config, str(out), **kwargs) == 0
  texts = {path.name: path.read_text('utf-8') for path in sorted(out.iterdir())}
  return {name: [json.loads(line) for line in text.splitlines()]
          if name.endswith('.jsonl') else text for name, text in texts.items()}


def test_files_and_counts(config, source, tmp_path, capsys):
  (where,) = [r.where.rpartition(':')[2] for r in records.read(
      str(source), columns={'body': 'text'})
      if r.fields['song'] == 's5' and r.fields['poet'] == ' ']
  files = _run(config, tmp_path / 'out')
  assert set(files) == {'train.jsonl', 'validation.jsonl', 'test.jsonl',
                        'removed.jsonl', 'changes.jsonl', 'review.jsonl',
                        'report.json', 'report.md', 'report.html'}
  kept, removed = _kept(files), files['removed.jsonl']
  assert [(r['step'], r['why']) for r in removed] == [
      ('missing', 'no text'), ('missing', '1 lines, fewer than 3'),
      ('duplicates', f'100% the same as {source}:{where}')]
  assert len(kept) == 40 and len(kept) + len(removed) == 43
  report = json.loads(files['report.json'])
  assert [report[name] for name in ('read', 'kept', 'removed', 'leaks')] == [
      43, 40, 3, []]
  assert report['config']['min_lines'] == 3
  out = capsys.readouterr().out
  assert '43 rows read = 40 kept + 3 removed' in out
  assert out.startswith(files['report.md'].strip()[:400])
  # Cleaned, filled, romanised beside the native text.
  assert not any(re.search('<|&amp;|  ', row['text']) for row in kept)
  assert [row['poet'] for row in kept if row['song'] == 's5'] == ['p1']
  assert all(row['text_iast'].startswith(('dila', 'nadī', 'śiuli', 'rain',
                                          'lamp &')) for row in kept)
  # Groups stay together, and styles in proportion.
  where = collections.defaultdict(set)
  for name in _NAMES:
    rows = files[f'{name}.jsonl']
    assert len(rows) == {'train': 32}.get(name, 4)
    styles = [row['style'] for row in rows]
    assert styles.count('film') == styles.count('folk')
    for row in rows:
      where[row['poet']].add(name)
  assert len(where) == 10 and all(len(names) == 1 for names in where.values())


def test_what_changed_can_be_followed(config, tmp_path):
  config.csv = True
  files = _run(config, tmp_path / 'out')
  read = {r.where: r.fields for r in records.read(
      config.source, columns={'body': 'text'})}
  cells = {}
  for change in files['changes.jsonl']:
    column = 'body' if change['column'] == 'text' else change['column']
    key = change['where'], column
    before = cells.get(key, read[change['where']].get(column))
    assert before == change['before'] != change['after'] and change['why']
    cells[key] = change['after']
  for removed in files['removed.jsonl']:
    fields = dict(removed['fields'])
    fields['body'] = fields.pop('text')
    assert fields == read.pop(removed['where'])
  final = collections.Counter(
      json.dumps({c: cells.get((where, c), value)
                  for c, value in fields.items()}, sort_keys=True)
      for where, fields in read.items())
  kept = collections.Counter(
      json.dumps({'body': row['text'], 'poet': row['poet'], 'song': row['song'],
                  'style': row['style']}) for row in _kept(files))
  assert final == kept
  for name in _NAMES:  # CSV reads back as JSON does.
    rows = records.read(str(tmp_path / 'out' / f'{name}.csv'))
    assert [row.fields for row in rows] == files[f'{name}.jsonl']
  # What is curated stays as it is.
  config.update(source=str(tmp_path / 'out' / 't*.jsonl'), romanise=())
  files = _run(config, tmp_path / 'again')
  assert files['changes.jsonl'] == files['removed.jsonl'] == []


def test_augmentation_adds_to_train_alone(config, tmp_path):
  plain = _run(config, tmp_path / 'a')
  config.update(augment=('line_order', 'span_dropout', 'paraphrase'),
                augment_share=0.5, augment_templates=('text={text}\n({poet})',))
  files = _run(config, tmp_path / 'b')
  for name in ('validation.jsonl', 'test.jsonl', 'removed.jsonl'):
    assert files[name] == plain[name]
  n = len(plain['train.jsonl'])
  assert files['train.jsonl'][:n] == plain['train.jsonl']
  made = files['train.jsonl'][n:]
  assert {row['augmented'] for row in made} == {
      'line_order', 'span_dropout', 'paraphrase'}
  sources = {row['song'] for row in plain['train.jsonl']}
  for row in made:
    assert row['song'] in sources and row['augmented_from']
    # The romanised text is that of the new text.
    assert row['text_iast'].count('\n') == row['text'].count('\n')
  report = json.loads(files['report.json'])
  assert (report['kept'], report['augmented']) == (40, len(made))
  assert report['splits']['train']['rows'] == n
  # The same seed gives the same files.
  assert _run(config, tmp_path / 'c') == files
  config.seed = 1
  assert _run(config, tmp_path / 'd')['test.jsonl'] != files['test.jsonl']


@hypothesis.settings(max_examples=60, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(
    rows=st.lists(st.tuples(_CELLS, _CELLS, st.sampled_from('pqr ')),
                  min_size=1, max_size=12),
    settings=st.fixed_dictionaries(dict(
        html=_ON, unicode=_ON, whitespace=_ON, lower=_ON,
        required=st.sampled_from((('text',), ())), min_lines=st.integers(0, 2),
        duplicates=st.sampled_from((0.0, 0.5, 1.0)),
        max_missing=st.sampled_from((0.0, 0.4, 1.0)),
        groups=st.sampled_from((('poet',), ())),
        fractions=st.sampled_from(((0.8, 0.1, 0.1), (1.0, 0.0, 0.0))),
        symbols=st.sampled_from(('', '♪')))))
def test_read_is_kept_and_removed(tmp_path_factory, rows, settings):
  path = tmp_path_factory.mktemp('raw') / 'raw.jsonl'
  path.write_text(''.join(
      json.dumps({'text': a, 'note': b, 'poet': c}) + '\n'
      for a, b, c in rows), 'utf-8')
  config = curation.get_config()
  config.update(source=str(path), text=('text',), punctuation=('text', 'note'),
                **settings)
  result = curate.curate(config)
  kept = [row.where for part in result.parts.values() for row in part]
  removed = [removal.where for removal in result.log.removals]
  assert sorted(kept + removed) == sorted(
      f'{path}:{i}' for i in range(1, len(rows) + 1))
  assert result.leaks == []


def test_a_dry_run_writes_nothing(source):
  out = source.parent / 'out'
  status, text, err = conftest.run_module(
      'curate', '--config=configs/curation.py:lyrics', '--dry_run',
      f'--out={out}', f'--config.source={source}', '--config.fill=',
      "--config.groups=('song',)")
  assert status == 0, err
  assert '43 rows read = 40 kept + 3 removed' in text
  assert not out.exists()


@pytest.mark.parametrize('command, flags', (
    ('train', ('--config=configs/lyrics.py', '--config.curate.source=raw.csv')),
    ('curate', ('--config=configs/lyrics.py', '--out=out')),
    ('curate', ('--config=configs/curation.py', '--config.curate.lower=true')),
    ('curate', ('--config=OWN', '--out=out'))))
def test_former_settings_are_redirected(tmp_path, command, flags):
  own = tmp_path / 'own.py'
  own.write_text('from configs import default\n\n\ndef get_config():\n'
                 '  config = default.get_config()\n'
                 "  config.curate.update(source='raw.csv')\n  return config\n")
  status, _, err = conftest.run_module(
      command, *(flag.replace('OWN', str(own)) for flag in flags))
  assert status == 2 and err.startswith('error: ') and 'Traceback' not in err
  assert '--config=configs/curation.py --config.source=raw.csv' in err


def test_every_setting_is_read():
  text = (conftest.ROOT / 'gemma_sft' / 'curate.py').read_text('utf-8')
  assert not [key for key in curation.get_config()
              if not re.search(rf'\bconfig\.{key}\b', text)]


def test_a_folder_is_not_overwritten_unasked(config, tmp_path):
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'mine.txt').write_text('mine')
  with pytest.raises(errors.UserError, match='is not empty'):
    curate.main(config, str(out))
  config.csv = True
  assert 'train.csv' in _run(config, out, overwrite=True)
  config.csv = False
  files = _run(config, out, overwrite=True)
  # Nothing of the earlier run stays, and what is not ours does.
  assert 'train.csv' not in files and files['mine.txt'] == 'mine'
  source, config.source = config.source, str(out / 'train.jsonl')
  with pytest.raises(errors.UserError, match='would replace the source'):
    curate.main(config, str(out), overwrite=True)
  with pytest.raises(errors.UserError, match='is a file'):
    curate.main(config, str(out / 'mine.txt'), overwrite=True)
  with pytest.raises(errors.UserError, match='--out is missing'):
    curate.main(config, None)
  config.update(source=source, fractions=(0.9, 0.1, 0.0))
  files = _run(config, out, overwrite=True)
  assert 'test.jsonl' not in files and 'validation.jsonl' in files


def test_lines_as_lists(tmp_path):
  path = tmp_path / 'raw.jsonl'
  path.write_text(''.join(json.dumps(
      {'lines': [f'<b>पहली {i}</b>', f'दूसरी {chr(97 + i) * 4}', f'तीसरी {i}']}
  ) + '\n' for i in range(20)), 'utf-8')
  config = curation.get_config()
  config.update(source=str(path), romanise=('lines',), csv=True, tokens='words')
  files = _run(config, tmp_path / 'out')
  row = files['train.jsonl'][0]
  assert row['lines'][0] == row['lines'][0].strip('</b>') == 'पहली 0'
  assert row['lines_iast'][0] == 'pahalī 0' and len(row['lines_iast']) == 3
  assert row['lines_words'][:2] == ['पहली', '0']
  assert 'पहली 0\nदूसरी aaaa' in files['train.csv']


def test_lines_are_flagged_and_too_few_groups_noted(config, tmp_path, source):
  (source.parent / 'mine.txt').write_text('roof\nभोर*\n', 'utf-8')
  config.lists = (str(source.parent / 'mine.txt'),)
  files = _run(config, tmp_path / 'out')
  flags = files['review.jsonl']
  assert len(flags) == 8 and {flag['line'] for flag in flags} == {2}
  assert {flag['text'] for flag in flags} == {'the roof'}
  assert flags[0]['found'] == ['roof'] and flags[0]['column'] == 'text'
  assert json.loads(files['report.json'])['kept'] == 40
  config.groups = ('style',)
  notes = '\n'.join(curate.curate(config).log.notes)
  assert '40 rows are in 2 groups, too few for 3 splits' in notes
  assert 'test has 0% of the rows instead of 10%' in notes


def _lower(config, text, **values):
  with open(config.source, 'w', encoding='utf-8') as file:
    csv.writer(file).writerows([['text'], [text]])
  config.update(lower=True, text=('text',), groups=(), balance='', fill='',
                min_lines=0, romanise=(), **values)
  result = curate.curate(config)
  return result.parts['train'][0].fields['text'], result.log.notes


def test_lower_case(config):
  config.lower = True
  curate.curate(config)  # IAST has no capitals.
  text = 'My iPhone and I walk HOME and by the sea we SING as loud as it can'
  assert _lower(config, text)[0] == text.lower()
  text, notes = _lower(config, 'तुझे देखा')
  assert text == 'तुझे देखा' and 'scripts without case' in notes[0]
  for text, values, problem in (  # It is refused where it would lose a sound.
      ('tujhe dekhA to ye jAnA sanam', {}, '33% of the words have a capital'),
      ('tujhe dekha', {'romanised': 'itrans'}, 'romanised is itrans')):
    with pytest.raises(errors.UserError, match=problem):
      _lower(config, text, **values)
    assert _lower(config, text, **{**values, 'romanised': 'none'})[0]


@pytest.mark.parametrize('changes, message', (
    *(({key: value}, f'config.{key} ') for key, value in (
        ('source', ''), ('fractions', (0.8, 0.1, 0.2)),
        ('fractions', (0.8, 0.2)), ('fractions', (1.2, -0.1, -0.1)),
        ('fractions', ('a', 'b', 'c')), ('duplicates', 1.5),
        ('duplicates', -0.1), ('ngram', 0), ('min_lines', -1), ('opening', -1),
        ('max_missing', 2.0), ('punctuation_share', -1.0),
        ('augment', ('lines',)), ('augment_share', 1.1), ('tokens', 'letters'),
        ('text', ('',)), ('rename', 'text'), ('fill', 'poet'),
        ('symbols', '['))),
    *(({key: 'itran'}, f"config.{key} (.*\n)*.*Did you mean 'itrans'")
      for key in ('scheme', 'romanised')),
    *(({key: value}, 'nope(.*\n)*  fix: .') for key, value in (
        ('required', ('nope',)), ('balance', 'nope'), ('romanise', ('nope',)),
        ('fill', 'poet=nope'), ('punctuation', ('nope',)), ('lists', ('nope',)),
        ('rename', 'a=nope'), ('augment_templates', ('text={nope}',)))),
    ({'groups': ('nope',)}, "config.groups: the data has no column 'nope'"),
    ({'text': ('txet',)}, "Did you mean 'text'"),
    ({'format': 'cvs'}, "Did you mean 'csv'"),
    ({'augment': ('paraphrase',)}, 'augment_templates is'),
    ({'rename': 'text_iast=style', 'balance': ''}, "has a column 'text_iast'"),
    ({'lower': True, 'scheme': 'hk'}, 'scheme is hk: there a capital'),
), ids=str)
def test_bad_settings_are_refused(config, changes, message):
  with config.unlocked():
    config.update(changes)
  with pytest.raises(errors.UserError, match=message):
    curate.main(config, None, dry_run=True)


@pytest.mark.parametrize('content, message', (
    ('text,poet\na,b\n"c"\nd,e\x00\n', 'raw.csv'), ('', 'no records in')))
def test_bad_sources_are_refused(config, source, content, message):
  source.write_text(content, 'utf-8')
  with pytest.raises(errors.UserError, match=message):
    curate.curate(config)


@pytest.mark.parametrize('name', ('lyrics', 'slang'))
def test_the_configs_curate_the_data_of_the_project(name):
  result = curate.curate(curation.get_config(name))
  assert result.num_read > 60 and result.leaks == []
  assert all(result.parts.values())
