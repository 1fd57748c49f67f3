"""Rows that say almost the same: found by MinHash, confirmed exactly."""

from collections.abc import Sequence
import unicodedata

import regex
import rensa

from gemma_sft.curation import romanise
from gemma_sft.curation import table
from gemma_sft.curation import words

# 32 bands of 4 rows: a pair of likeness s shares a band with probability
# 1 - (1 - s^4)^32, which is 0.87 at s = 0.5 and 0.9998 at 0.7.
_PERMUTATIONS, _BANDS = 128, 32
# The hash functions are part of what is reproduced, whatever config.seed is.
_SEED = 1


def similar_pairs(
    texts: Sequence[str], threshold: float, n: int
) -> list[tuple[int, int, float]]:
  """Returns (i, j, likeness), i < j, of texts at least `threshold` alike.

  Likeness is Jaccard's, of the sets of n-grams of characters
  (`words.shingles`): exact, only the choice of pairs is by chance. A text in
  Latin letters is compared with romanised ones (IAST, diacritics aside) of the
  Indic texts. Texts without a letter are like none.
  """
  likeness = _similar_pairs(texts, threshold, n)
  scripts = [words.script(text) for text in texts]
  is_indic = [bool(romanise.INDIC.search(text)) for text in texts]
  if 'Latin' in scripts and any(is_indic):
    latin = [_plain(romanise.romanise(text)) for text in texts]
    for (i, j), value in _similar_pairs(latin, threshold, n).items():
      if is_indic[i] != is_indic[j]:
        likeness.setdefault((i, j), value)
  return [(i, j, value) for (i, j), value in sorted(likeness.items())]


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
      likeness = len(sets[i] & grams) / len(sets[i] | grams)
      if likeness >= threshold:
        pairs[i, j] = likeness
    index.insert(j, sketch)
  return pairs


def _plain(text: str) -> str:
  """Returns Latin text without diacritics."""
  return regex.sub(r'\p{Mn}', '', unicodedata.normalize('NFD', text))


def remove_duplicates(
    rows: Sequence[table.Row], account: table.Account, names: Sequence[str],
    threshold: float, n: int) -> list[table.Row]:
  """Returns the rows without those that are nearly the same as a fuller one.

  The fuller of two has fewer missing cells, then its own script, then more
  text, then came first. Every row that is taken out is like one that stays,
  which is named.
  """
  like = {}
  texts = ['\n'.join(table.as_text(row.fields.get(name)) for name in names)
           for row in rows]
  for i, j, likeness in similar_pairs(texts, threshold, n):
    like.setdefault(i, {})[j] = likeness
    like.setdefault(j, {})[i] = likeness

  def fullness(i):
    cells = rows[i].fields.values()
    return (sum(not table.is_missing(cell) for cell in cells),
            bool(romanise.INDIC.search(texts[i])), len(texts[i]), -i)

  kept = set(range(len(rows))) - like.keys()
  duplicates = {}
  for i in sorted(like, key=fullness, reverse=True):
    originals = kept & like[i].keys()
    if not originals:
      kept.add(i)
      continue
    best = max(originals, key=lambda k: (like[i][k], -k))
    duplicates[i] = best
  for i, best in sorted(duplicates.items()):
    account.remove(
        rows[i], 'duplicates',
        f'{like[i][best]:.0%} the same as {rows[best].where}')
  return [rows[i] for i in sorted(kept)]
