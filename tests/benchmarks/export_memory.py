"""Measures the peak memory of merging and writing an export.

    python tests/benchmarks/export_memory.py --workdir=W [--format=hf]

It writes into a temporary folder without a proof, and compares the peak above
the process's resident memory with the promise: twice the largest tensor plus
one shard.
"""

import math
import pathlib
import tempfile

from absl import app
from absl import flags
from peers import meter

from gemma_sft import cli
from gemma_sft import export
from gemma_sft.exports import formats
from gemma_sft.run import restore

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of a run.', required=True)
_FORMAT = flags.DEFINE_string('format', 'hf', 'Format of the export.')
_SHARD = flags.DEFINE_float('shard_size', 0.2, 'Largest file of hf, in GB.')


def main(_):
  config = cli.load_run_config(_WORKDIR.value)
  chosen = restore.choose_weights(config, _WORKDIR.value, base=False, step=-1)
  source = export.make_source(chosen, 'benchmark', 'bfloat16', _SHARD.value)
  row = formats.FORMATS[_FORMAT.value]
  largest = 4 * max(map(math.prod, source.layout.shapes.values()))
  shard = source.max_shard_bytes if row.name == 'hf' else 0
  before = meter.resident_bytes()
  with tempfile.TemporaryDirectory() as folder:
    row.write(pathlib.Path(folder) / row.path, source)
  above = meter.resident_bytes(peak=True) - before
  allowed = 2 * largest + shard
  print(f'{row.name}: model {row.n_bytes(source) / 1e6:.0f} MB, largest tensor'
        f' {largest / 1e6:.0f} MB; before {before / 1e6:.0f} MB, peak'
        f' {above / 1e6:.0f} MB above; allowed {allowed / 1e6:.0f} MB'
        f' ({above / allowed:.0%})')


if __name__ == '__main__':
  app.run(main)
