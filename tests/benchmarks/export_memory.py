"""Peak memory of merging and writing an export, against what is promised.

    python tests/benchmarks/export_memory.py --workdir=W [--format=hf]

Writes into a temporary folder, proves nothing, and prints the peak above what
the process held before it began, beside twice the largest tensor plus one
shard.
"""

import pathlib
import resource
import tempfile

from absl import app
from absl import flags

_WORKDIR = flags.DEFINE_string('workdir', None, 'Of a run.', required=True)
_FORMAT = flags.DEFINE_string('format', 'hf', 'Of the export.')
_SHARD = flags.DEFINE_float('shard_size', 0.2, 'In GB.')


def _resident() -> int:
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return pages * resource.getpagesize()


def _peak() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(_):
  import numpy as np

  from gemma_sft import cli
  from gemma_sft import export
  from gemma_sft.exports import arrays
  from gemma_sft.exports import writer
  from gemma_sft.run import restore

  config = cli.load_run_config(_WORKDIR.value)
  chosen = restore.choose_weights(config, _WORKDIR.value, base=False, step=-1)
  source = writer.Source(
      chosen.model, chosen.tokenizer, arrays.open_arrays(chosen), 'benchmark',
      temperature=0.2, repetition_penalty=1.1)
  [job] = export.plan(source, [_FORMAT.value], 'bfloat16')
  largest = 4 * max(
      int(np.prod(s)) for s in source.layout.shapes.values())
  shard = int(_SHARD.value * 1e9) if _FORMAT.value == 'hf' else 0
  before = _resident()
  with tempfile.TemporaryDirectory() as folder:
    export.write(
        job, pathlib.Path(folder), source, config, 'bfloat16', _SHARD.value)
  above = _peak() - before
  allowed = 2 * largest + shard
  print(f'{_FORMAT.value}: model {job.n_bytes / 1e6:.0f} MB, largest tensor'
        f' {largest / 1e6:.0f} MB; before {before / 1e6:.0f} MB, peak'
        f' {above / 1e6:.0f} MB above; allowed {allowed / 1e6:.0f} MB'
        f' ({above / allowed:.0%})')


if __name__ == '__main__':
  app.run(main)
