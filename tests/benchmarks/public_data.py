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
_SQL_VALIDATION = ('pets_1', 'voter_1')
_SQL_TEST = ('car_1', 'singer', 'museum_visit')


def _share(key: str) -> float:
  """Returns a number from 0 to 1 that depends only on the key."""
  return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32


def _split(key: str) -> str:
  share = _share(key)
  if share < 0.7:
    return 'train'
  return 'validation' if share < 0.8 else 'test'


def _jsonl(path):
  return [json.loads(line) for line in path.read_text('utf-8').split('\n')
          if line]


def _write(folder, splits):
  folder.mkdir(parents=True, exist_ok=True)
  for split, rows in splits.items():
    text = ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)
    folder.joinpath(f'{split}.jsonl').write_text(text, 'utf-8')
  print(folder.name, {split: len(rows) for split, rows in splits.items()})


def _grouped(rows, key):
  splits = {'train': [], 'validation': [], 'test': []}
  for row in rows:
    splits[_split(key(row))].append(row)
  return splits


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
  _write(out, _grouped(rows, lambda r: ' '.join(r['lines'][:2])))


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
  _write(out, _grouped(rows, lambda r: first[r['description'].lower()]))


def _sql(source, out):
  rows = _jsonl(source / 'dev.jsonl')
  _write(out, {
      'train': [row for row in rows if row['db_id'] not in (
          *_SQL_VALIDATION, *_SQL_TEST)],
      'validation': [row for row in rows if row['db_id'] in _SQL_VALIDATION],
      'test': [row for row in rows if row['db_id'] in _SQL_TEST]})
  shutil.copytree(source / 'database', out / 'database', dirs_exist_ok=True)


def _blop(source, out):
  parts = source.joinpath('input.txt').read_text('utf-8').split('# INPUT')[1:]
  out.mkdir(parents=True, exist_ok=True)
  splits = _grouped(
      parts, lambda part: part.partition('# OUTPUT')[0].strip().lower())
  for split, group in splits.items():
    out.joinpath(f'{split}.txt').write_text(
        ''.join(f'# INPUT{part}' for part in group), 'utf-8')
  print('blop', {split: len(group) for split, group in splits.items()})


def main() -> None:
  """Splits every domain that the source has."""
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
