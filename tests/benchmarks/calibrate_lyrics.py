"""Prints the judge's scores of real and of broken songs.

    python tests/benchmarks/calibrate_lyrics.py --data=test.jsonl \
        --train=train.jsonl

The table has a row for the songs themselves and for each way of breaking them,
and a column for each metric.
"""

import argparse
import random

from gemma_sft import pages
from gemma_sft.curation import romanise
from gemma_sft.inputs import records
from gemma_sft.tasks.lyrics import task


def broken(openings: list[list[str]], rests: list[list[str]],
           training: list[list[str]]) -> dict[str, list[list[str]]]:
  """Returns {what was changed: the completions, as lists of lines}."""
  rng = random.Random(0)
  rows = {
      'the song itself': rests,
      'its lines shuffled': [rng.sample(rest, len(rest)) for rest in rests],
      'its first half': [rest[:len(rest) // 2] for rest in rests],
      'romanised': [[*map(romanise.romanise, rest)] for rest in rests],
      'characters of each line shuffled': [
          [''.join(rng.sample(line, len(line))) for line in rest]
          for rest in rests],
      "another song's rest": rests[1:] + rests[:1],
      'the first line again and again': [
          opening[:1] * len(rest) for opening, rest in zip(openings, rests)],
      'nothing': [[] for _ in rests]}
  if training:
    rows['the rest of a training song'] = [rng.choice(training) for _ in rests]
  return rows


def _rest(song):
  return task.to_messages(song)[-1].content.split('\n')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', required=True, help='songs, such as test.jsonl')
  parser.add_argument('--train', help='training songs, for `copied`')
  args = parser.parse_args()
  songs = records.read(args.data)
  training = records.read(args.train) if args.train else []
  rests = [_rest(song) for song in songs]
  openings = [task.song_lines(song)[:-len(rest)]
              for song, rest in zip(songs, rests)]
  judged = {
      what: task.judge(songs, ['\n'.join(c) for c in completions], training)
      for what, completions in broken(
          openings, rests, [_rest(song) for song in training]).items()}
  real = judged['the song itself']
  names = [name for name in real.metrics if name != 'n']
  print(f'{len(songs)} songs,'
        f' {sum("refrain" in row for row in real.rows)} with a refrain')
  print(pages.table(('answer', *names), [
      (what, *(f'{result.metrics[name]:.2f}' for name in names))
      for what, result in judged.items()]))


if __name__ == '__main__':
  main()
