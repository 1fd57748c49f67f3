"""Splits public data of the five domains for the five configs.

    python tests/benchmarks/public_data.py --source=DIR --out=OUT

DIR holds published data, which you download:

    blop/input.txt                    github.com/batiste/gemma-learn-blop
    poetry/tang_{train,val}.jsonl     regular Tang poems of
                                      github.com/chinese-poetry/chinese-poetry
    lyrics/ghazals.jsonl              github.com/amir9ume/urdu_ghazals_rekhta
    slang/genz_slang.csv              github.com/kaspercools/genz-dataset
    sql/dev.jsonl, sql/database/      Spider's dev questions and databases

Writes OUT/<domain>/{train,validation,test}, the same every time. Rows of one
group stay in one split: a slang term, a database, a poem's title, the opening
of a song.
"""

import argparse
import csv
import hashlib
import json
import pathlib
import shutil

# Databases of the held-out splits: no training question is about them, their
# subjects differ, and each split has about a fifth of the questions.
_SQL_SPLITS = dict.fromkeys(('pets_1', 'voter_1'), 'validation') | (
    dict.fromkeys(('car_1', 'singer', 'museum_visit'), 'test'))


def _split(key: str) -> str:
  """Returns a split that depends only on the key."""
  share = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32
  if share < 0.7:
    return 'train'
  return 'validation' if share < 0.8 else 'test'


def _jsonl(path):
  return [json.loads(line) for line in path.read_text('utf-8').split('\n')
          if line]


def _write(folder, splits, ending='.jsonl', line=(
    lambda row: json.dumps(row, ensure_ascii=False) + '\n')):
  folder.mkdir(parents=True, exist_ok=True)
  for split, rows in splits.items():
    (folder / f'{split}{ending}').write_text(''.join(map(line, rows)), 'utf-8')
  print(folder.name, {split: len(rows) for split, rows in splits.items()})


def _grouped(rows, split_of):
  return {split: [row for row in rows if split_of(row) == split]
          for split in ('train', 'validation', 'test')}


def _poetry(source, out):
  train = _jsonl(source / 'tang_train.jsonl')
  held = sorted(_jsonl(source / 'tang_val.jsonl'), key=lambda r: r['id'])
  # Poems of one title have the same prompt, so they stay in one split.
  splits = {'train': train, 'validation': [], 'test': []}
  seen = {(r['title'], r['form']) for r in train}
  for row in held:
    if (row['title'], row['form']) not in seen:
      seen.add((row['title'], row['form']))
      split = 'validation' if len(splits['validation']) < 60 else 'test'
      splits[split].append(row)
  _write(out, splits)


def _lyrics(source, out):
  rows = [{'lines': row['hi'], 'style': 'ghazal', 'poet': row['poet'],
           'language': 'Hindi'}
          for row in _jsonl(source / 'ghazals.jsonl') if len(row['hi']) >= 6]
  _write(out, _grouped(rows, lambda r: _split(' '.join(r['lines'][:2]))))


def _slang(source, out):
  with open(source / 'genz_slang.csv', encoding='utf-8', newline='') as file:
    rows = [{'slang': (r['keyword'] or '').strip(),
             'description': (r['description'] or '').strip()}
            for r in csv.DictReader(file)]
  rows = [r for r in rows if all(r.values())]
  # Terms with the same description have the same prompt.
  first = {}
  for row in rows:
    first.setdefault(row['description'].lower(), row['slang'].lower())
  _write(out, _grouped(
      rows, lambda r: _split(first[r['description'].lower()])))


def _sql(source, out):
  _write(out, _grouped(
      _jsonl(source / 'dev.jsonl'),
      lambda row: _SQL_SPLITS.get(row['db_id'], 'train')))
  shutil.copytree(source / 'database', out / 'database', dirs_exist_ok=True)


def _blop(source, out):
  parts = source.joinpath('input.txt').read_text('utf-8').split('# INPUT')[1:]
  _write(out, _grouped(parts, lambda part: _split(
      part.partition('# OUTPUT')[0].strip().lower())), '.txt',
         '# INPUT{}'.format)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--source', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  args = parser.parse_args()
  for split in (_blop, _poetry, _lyrics, _slang, _sql):
    name = split.__name__.lstrip('_')
    if args.source.joinpath(name).is_dir():
      split(args.source / name, args.out / name)


if __name__ == '__main__':
  main()
