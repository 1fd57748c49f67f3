"""Prints the judge's scores of real and of broken songs.

    python tests/benchmarks/calibrate_lyrics.py --data=test.jsonl \
        --train=train.jsonl

The table has a row for the songs themselves and for each way of breaking them,
and a column for each metric.
"""

import argparse
import random

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
      'nothing': [[] for _ in rests],
  }
  if training:
    rows['the rest of a training song'] = [
        rng.choice(training) for _ in rests]
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', required=True, help='songs, such as test.jsonl')
  parser.add_argument('--train', help='training songs, for `copied`')
  args = parser.parse_args()
  songs = records.read(args.data)
  training = records.read(args.train) if args.train else []
  openings, rests = [], []
  for song in songs:
    lines = task.song_lines(song)
    rests.append(task.to_messages(song)[-1].content.split('\n'))
    openings.append(lines[:len(lines) - len(rests[-1])])
  training_rests = [
      task.to_messages(song)[-1].content.split('\n') for song in training]

  names = []
  for what, completions in broken(openings, rests, training_rests).items():
    judged = task.judge(songs, ['\n'.join(c) for c in completions], training)
    if not names:
      names = [name for name in judged.metrics if name != 'n']
      print(f'{len(songs)} songs,'
            f' {sum("refrain" in row for row in judged.rows)} with a refrain')
      print('| answer |', ' | '.join(names), '|')
      print('|---' * (len(names) + 1) + '|')
    print(f'| {what} |', ' | '.join(
        f'{judged.metrics[name]:.2f}' for name in names), '|')


if __name__ == '__main__':
  main()
