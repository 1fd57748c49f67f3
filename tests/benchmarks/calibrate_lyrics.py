"""Prints the judge's scores of real and of broken songs.

    python tests/benchmarks/calibrate_lyrics.py --data=test.jsonl \
        --train=train.jsonl

The table has a row for the songs themselves and for each way of breaking them,
and a column for each metric.
"""

import random

from absl import app
from absl import flags

from gemma_sft import pages
from gemma_sft.curation import romanise
from gemma_sft.inputs import records
from gemma_sft.tasks.lyrics import task

_DATA = flags.DEFINE_string(
    'data', None, 'Songs, such as test.jsonl.', required=True)
_TRAIN = flags.DEFINE_string('train', '', 'Training songs, for `copied`.')


def _rest(song):
  return task.to_messages(song)[-1].content.split('\n')


def main(_):
  songs, rng = records.read(_DATA.value), random.Random(0)
  training = records.read(_TRAIN.value) if _TRAIN.value else []
  rests = [_rest(song) for song in songs]
  answers = {
      'the song itself': rests,
      'its lines shuffled': [rng.sample(rest, len(rest)) for rest in rests],
      'its first half': [rest[:len(rest) // 2] for rest in rests],
      'romanised': [[*map(romanise.romanise, rest)] for rest in rests],
      'characters of each line shuffled': [
          [''.join(rng.sample(line, len(line))) for line in rest]
          for rest in rests],
      "another song's rest": rests[1:] + rests[:1],
      'the first line again and again': [
          task.song_lines(song)[:1] * len(rest)
          for song, rest in zip(songs, rests)],
      'nothing': [[] for _ in rests]}
  if training:
    answers['the rest of a training song'] = [
        _rest(rng.choice(training)) for _ in rests]
  judged = {what: task.judge(songs, list(map('\n'.join, lines)), training)
            for what, lines in answers.items()}
  real = judged['the song itself']
  names = [name for name in real.metrics if name != 'n']
  print(f'{len(songs)} songs,'
        f' {sum("refrain" in row for row in real.rows)} with a refrain')
  print(pages.table(('answer', *names), [
      (what, *(f'{result.metrics[name]:.2f}' for name in names))
      for what, result in judged.items()]))


if __name__ == '__main__':
  app.run(main)
