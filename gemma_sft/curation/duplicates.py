"""Removes near-duplicate rows, which MinHash proposes and Jaccard confirms."""

import collections
from collections.abc import Sequence
import unicodedata

import regex
import rensa

from gemma_sft.curation import romanise
from gemma_sft.curation import table
from gemma_sft.curation import words

# 32 bands of 4 rows: a pair of similarity s shares a band with probability
# 1 - (1 - s^4)^32, which is 0.87 at s = 0.5 and 0.9998 at 0.7.
_PERMUTATIONS, _BANDS = 128, 32
# Fixed, so that config.seed does not change which duplicates are found.
_SEED = 1


def similar_pairs(
    texts: Sequence[str], threshold: float, n: int
) -> list[tuple[int, int, float]]:
  """Returns (i, j, similarity), i < j, of texts at least `threshold` similar.

  The similarity is the exact Jaccard index of their character n-grams
  (`words.shingles`); only the search for pairs is probabilistic. Texts in Latin
  letters are also compared with the romanised Indic texts (IAST without
  diacritics). An empty text is similar to none.
  """
  similarity = _similar_pairs(texts, threshold, n)
  scripts = [words.script(text) for text in texts]
  is_indic = [bool(romanise.INDIC.search(text)) for text in texts]
  if 'Latin' in scripts and any(is_indic):
    latin = [
        regex.sub(r'\p{Mn}', '', unicodedata.normalize(
            'NFD', romanise.romanise(text))) for text in texts]
    for (i, j), value in _similar_pairs(latin, threshold, n).items():
      if is_indic[i] != is_indic[j]:
        similarity.setdefault((i, j), value)
  return [(i, j, value) for (i, j), value in sorted(similarity.items())]


def _similar_pairs(texts, threshold, n) -> dict[tuple[int, int], float]:
  sets = [words.shingles(text, n) for text in texts]
  index = rensa.RMinHashLSH(
      threshold=threshold, num_perm=_PERMUTATIONS, num_bands=_BANDS)
  pairs = {}
  for j, grams in enumerate(sets):
    if not grams:
      continue
    sketch = rensa.RMinHash(num_perm=_PERMUTATIONS, seed=_SEED)
    sketch.update(sorted(grams))
    for i in index.query(sketch):
      similarity = len(sets[i] & grams) / len(sets[i] | grams)
      if similarity >= threshold:
        pairs[i, j] = similarity
    index.insert(j, sketch)
  return pairs


def remove_duplicates(
    rows: table.Rows, log: table.ChangeLog, names: Sequence[str],
    threshold: float, n: int) -> list[table.TableRow]:
  """Returns the rows without those that nearly equal a more complete row.

  Of two rows the more complete one has fewer missing cells, else an Indic
  script, else more text, else came first. Every removed row is similar to a row
  that stays, which the log names.
  """
  texts = [table.joined(row, names) for row in rows]
  similar = collections.defaultdict(dict)
  for i, j, similarity in similar_pairs(texts, threshold, n):
    similar[i][j] = similar[j][i] = similarity

  def completeness(i):
    cells = rows[i].fields.values()
    return (sum(not table.is_missing(cell) for cell in cells),
            bool(romanise.INDIC.search(texts[i])), len(texts[i]), -i)

  kept = set(range(len(rows))) - similar.keys()
  originals = {}
  for i in sorted(similar, key=completeness, reverse=True):
    if candidates := kept & similar[i].keys():
      originals[i] = max(candidates, key=lambda k: (similar[i][k], -k))
    else:
      kept.add(i)
  for i, original in sorted(originals.items()):
    log.remove(rows[i], 'duplicates',
               f'{similar[i][original]:.0%} the same as {rows[original].where}')
  return [rows[i] for i in sorted(kept)]
