"""Every setting of `gemma_sft.curate`, its default and its reason.

    python -m gemma_sft.curate --config=configs/curation.py \
        --config.source=raw.csv --config.lower=true --out=DIR
    python -m gemma_sft.curate --config=configs/curation.py:lyrics --out=DIR

A config of your own begins its get_config with `config =
curation.get_config()` and changes what it needs.
"""

from ml_collections import config_dict


def get_config(arg: str = '') -> config_dict.ConfigDict:
  """Returns the settings in the order of the steps; `source` has to be set.

  'lyrics' is for data/lyrics/raw.csv, 'slang' for data/slang.
  """
  config = config_dict.ConfigDict()
  # Decides the order in which rows go to the splits, and the augmentation.
  config.seed = 0
  # The raw collection: a file or pattern, as data.train in configs/default.py.
  config.source = ''
  config.format = 'auto'
  # Renames columns first: 'text=lyrics' reads the column lyrics as text.
  config.rename = ''
  # The columns of text; () for all that hold text or lists of lines. Other
  # columns are cleaned too, but not lower-cased, compared or counted.
  config.text = ()
  config.html = True  # Remove tags and decode entities; line breaks stay.
  # Pattern of the package `regex` for symbols to remove, '' for none: notes and
  # ornaments of lyrics pages, private-use characters of fonts, and the mark
  # that replaces an undecodable byte.
  config.symbols = '[\u2669-\u266c★☆►▶■□▪▫◆◇●✦✧❖❀✿\ufffd\\p{Co}]'
  # Repair mojibake, write each letter in one form, remove invisible characters.
  config.unicode = True
  config.whitespace = True
  # Lower-case the text. This is refused for text romanised in a scheme where a
  # capital stands for another sound, and if `scheme` below is such a scheme.
  config.lower = False
  # The scheme in which the text is romanised already, such as itrans; none says
  # that it is not; '' decides by capitals inside words.
  config.romanised = ''
  # Columns in which a line without a final mark gets one, if more than
  # punctuation_share of comparable lines have one; () for none.
  config.punctuation = ()
  config.punctuation_share = 0.5
  # Fill missing cells from another row of the same group: 'poet=song'.
  config.fill = ''
  config.required = ()  # Columns that every row must have.
  # Rows with a larger share of their columns missing are removed.
  config.max_missing = 0.5
  config.min_lines = 1  # Texts with fewer lines are removed.
  # Rows count as duplicates from this similarity on (Jaccard index of their
  # character n-grams); 0 keeps all rows. Of Tang poems, 0.7 with n = 2 finds
  # 872 pairs in 19,878.
  config.duplicates = 0.7
  config.ngram = 3
  # Word lists of gemma_sft/curation/lists/, or files of your own. Lines with a
  # listed word are copied to review.jsonl; nothing is removed.
  config.lists = ('english', 'hindi', 'bengali')
  config.fractions = (0.8, 0.1, 0.1)  # Shares of train, validation and test.
  # A column whose values keep their proportions in each split; '' for none.
  config.balance = ''
  # Rows that share a value of one of these columns, ignoring case, go to the
  # same split.
  config.groups = ()
  # So do rows whose first `opening` lines are as similar as duplicates; 0
  # ignores openings.
  config.opening = 2
  # Add altered copies of training rows: line_order, span_dropout, paraphrase
  # (gemma_sft/curation/augment.py), each for augment_share of the rows.
  config.augment = ()
  config.augment_share = 0.25
  # For paraphrase: 'description=You say it when {description}'.
  config.augment_templates = ()
  config.augment_keep = ()  # Phrases that augmentation leaves in place.
  # Columns to romanise into new columns COLUMN_SCHEME; schemes are iast, iso,
  # kolkata_v2, titus, hk, itrans, optitrans and slp1.
  config.romanise = ()
  config.scheme = 'iast'
  # Adds a column with the list of each text's words or aksharas (characters as
  # readers see them); '' for neither.
  config.tokens = ''
  # Writes .csv beside .jsonl; lists of lines become lines of a cell.
  config.csv = False
  if arg == 'lyrics':
    # Missing poets and styles come from another copy of the song.
    config.update(
        source='data/lyrics/raw.csv', text=('text',), required=('text',),
        fill='poet=title,style=title', min_lines=3, punctuation=('text',),
        balance='style', groups=('title', 'poet'), romanise=('text',))
  elif arg == 'slang':
    # A term is in one split whatever its case. Two terms may mean much the same
    # (e-boy and e-girl are 87 % alike in one public list), so only nearly equal
    # rows count as duplicates, and definitions may begin alike.
    config.update(
        source='data/slang/*.csv', text=('Slang', 'Description', 'Example'),
        required=('Slang', 'Description'), groups=('Slang',), duplicates=0.95,
        opening=0, punctuation=('Description', 'Example'), csv=True)
  elif arg:
    raise ValueError(f'configs/curation.py:{arg}: use :lyrics, :slang or none')
  # In a locked config a mistyped key is an error.
  return config.lock()
