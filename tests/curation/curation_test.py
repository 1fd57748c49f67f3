"""The parts of curation: what is repaired, what stays, pitfalls of scripts."""

import re
import unicodedata

import hypothesis
from hypothesis import strategies as st
import pytest

from gemma_sft import errors
from gemma_sft.curation import augment
from gemma_sft.curation import characters
from gemma_sft.curation import duplicates
from gemma_sft.curation import report
from gemma_sft.curation import romanise
from gemma_sft.curation import splits
from gemma_sft.curation import table
from gemma_sft.curation import words

_FEW = hypothesis.settings(
    max_examples=150, deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow])
# Letters, marks, joiners, spaces and markup of the scripts that matter here.
_TEXTS = st.text(
    st.sampled_from('aZé 3<>&;/bp\n\t\u00a0\u200b\u200c\u200d"।,，“'
                    'कजाि़्ंআযড়়র্য春眠❤👩♪'), max_size=24)
_NAMES = st.sampled_from(
    ['&amp;', '&lt;', '&#39;', '&nbsp;', '<br>', '<b>', '</b>', '<p>', '</p>',
     '<', '>', '&', 'a', ' ', '\n', '3', 'â€™', 'ज़', '<div class="x">'])
_MARKUP = st.lists(_NAMES, max_size=10).map(''.join)
_STEPS = (characters.strip_html, characters.repair_encoding,
          characters.remove_invisible, characters.compose_nukta,
          characters.regular_whitespace, characters.lower)
_VERSE = 'the river carries every lamp that we forgot to light'
_NATIVE = 'कागा रे, मायके जा कह देना, झूला मैं भी डालूँगी'
_SONG = [f'line {i}' for i in range(10)]


def _rows(*fields, start=1):
  return [table.TableRow(f'f:{i}', f) for i, f in enumerate(fields, start)]


def _clean(text):
  for step in _STEPS:
    text = step(text)
  return text


@_FEW
@hypothesis.given(text=_TEXTS | _MARKUP)
@pytest.mark.parametrize('step', (*_STEPS, _clean), ids=lambda f: f.__name__)
def test_a_clean_text_stays_as_it_is(step, text):
  once = step(text)
  # A second pass of all steps may find a tag or an entity that an invisible
  # character divided (&am\u200bp;), a third never has work.
  if step is _clean:
    once = step(once)
  assert step(once) == once


@pytest.mark.parametrize('step', _STEPS[:-1], ids=lambda f: f.__name__)
def test_what_is_right_is_not_touched(step):
  for text in ('I <3 you & 3 > 2', 'x<y and y>z', 'if a <b and c> d', '“a” ‘b’',
               'R&D, ?a=1&copy=2', 'तुझे देखा तो ये',
               '春眠不覺曉，處處聞啼鳥。', 'a <x1> b', 'র‍্যাব', 'क्‌ष',
               'می‌خواهم', '👩‍👩‍👧', 'naïve café', 'एक।\nदो॥\n\nतीन'):
    assert step(text) == text


def _repair(text):
  return characters.compose_nukta(
      characters.remove_invisible(characters.repair_encoding(text)))


@pytest.mark.parametrize('function, cases', (
    (lambda html: characters.strip_html(html).strip('\n'), {
        # What a browser shows.
        'a<br />\nb<br>c': 'a\nb\nc', '<p>a</p><p>b</p>': 'a\n\nb',
        '<div class="x">one</div><div>two</div>three': 'one\ntwo\nthree',
        'it&#39;s &lt;3&nbsp;me': "it's <3\u00a0me",
        'a &amp;amp; b &lt;br&gt; c': 'a & b \nc',
        'x<script>alert("<b>")</script><style>b{}</style>y': 'xy',
        '<html><head><title>T</title></head><body>hi <b>you</b>': 'hi you',
        'x<y <b>and</b> z': 'x<y and z', 'a<!-- <b> -->b': 'ab',
        '?a&copy=1 &amp; <b>x': '?a&copy=1 & x', '<i title="a>b">x</i>': 'x',
        'I <3 <b>you</b> & 3 > 2': 'I <3 you & 3 > 2'}),
    (_repair, {'modelâ€™s ðŸ‘‰': 'model’s 👉',
               # The default of ftfy makes a comma and straight quotes of these.
               '春，“眠”': '春，“眠”',
               'e\u0301 \ufeffa\u200bb\u00ad \ufb01': 'é ab fi'}),
    (characters.remove_invisible, {  # Joiners stay where they mean something.
        **{text: text for text in (
            'ক\u200dখ', 'क्\u200dष', 'क्\u200c', 'می\u200cخواهم', '👩\u200d👧')},
        **{text: re.sub('[\u200c\u200d]', '', text) for text in (
            'a\u200db', 'क \u200dख', 'क\u200c', '\u200dक', '春\u200c眠',
            '👩\u200c👧')}}),
    (characters.regular_whitespace, {
        ' a\u00a0\t b \r\n\r\n\n\u3000c\u2028d \n': 'a b\n\nc\nd'}),
    (characters.compose_nukta, {
        # A nukta after the vowel sign, and twice; Unicode has no such अ.
        'ग\u0948\u093cब': '\u095a\u0948ब', 'ज\u093cि\u093c': '\u095bि',
        'अ\u093c': 'अ\u093c'}),
    (characters.capitals_inside, {
        'tujhe dekhA to ye jAnA sanam': 1 / 3, 'tujhe dekhā to ye jānā': 0,
        'तुझे देखा': 0, 'My iPhone and YOU. Mr. Jones': 1 / 6}),
    (words.words, {'तुझे देखा, तो ये!': ['तुझे', 'देखा', 'तो', 'ये'],
                   'র‍্যাব এলো': ['র‍্যাব', 'এলো'],
                   "Don't rock-n-roll, it’s 3": [
                       "Don't", 'rock', 'n', 'roll', 'it’s', '3'],
                   '春眠 ok。曉': ['春', '眠', 'ok', '曉']}),
    (words.aksharas, {'क्षत्रिय हिन्दी': ['क्ष', 'त्रि', 'य', 'हि', 'न्दी'],
                      '春 眠': ['春', '眠']}),
    (words.script, {'तुझे ok देखा।': 'Devanagari', 'ভালো': 'Bengali', '12 !': ''}),
    (romanise.romanise, {
        'क\u093cदम': 'qadama', '\u0958दम': 'qadama', 'कॉफ़ी': 'kôfī',
        'ऑफ': 'ôpha', 'हँसी': 'ham̐sī', 'पढ़ना': 'par̤hanā',
        'আমায\u09bc': 'āmāẏa', 'আমা\u09df': 'āmāẏa', 'ভালোবাসা': 'bhālobāsā',
        'স্বপ্ন': 'svapna', 'র\u200d্যাব': 'ryāba', 'হঠাৎ': 'haṭhāt',
        'दिल। love 春': 'dila| love 春', 'گل': 'گل', '': ''})))
def test_functions_of_texts(function, cases):
  assert {text: function(text) for text in cases} == cases


def test_nukta_letters_are_one_character():
  for pair, letter in (('ज\u093c', '\u095b'), ('য\u09bc', '\u09df'),
                       ('ড\u09bc', '\u09dc'), ('ঢ\u09bc', '\u09dd')):
    # NFC alone takes them apart.
    assert unicodedata.normalize('NFC', letter) == pair
    assert characters.compose_nukta(pair) == letter
    assert characters.compose_nukta(letter) == letter
  from indic_transliteration import sanscript
  for native, name in (('क़दम ज़रा बड़ा ग़म', sanscript.DEVANAGARI),
                       ('আমায় বড় ভালো', sanscript.BENGALI)):
    latin = romanise.romanise(native, 'iso')
    back = sanscript.transliterate(latin, sanscript.ISO, name)
    assert characters.compose_nukta(back) == characters.compose_nukta(native)


def test_lists(tmp_path):
  path = tmp_path / 'mine.txt'
  path.write_text('# mine\nबुरा  # comment\nspill the tea\nज़ह*\n', 'utf-8')
  entries = words.load_list(str(path))

  def found(text):
    return [' '.join(e.words) for e in words.find_listed(text, entries)]

  assert found('यह बुरा है') == ['बुरा']
  assert found('बुराई') == found('spill tea') == []  # Whole words.
  assert found('Spill THE tea, ज\u093cहर') == ['spill the tea', '\u095bह']
  with pytest.raises(errors.UserError, match="no list 'hindu'.*\n.*\n.*hindi"):
    words.load_list('hindu')
  assert words.builtin_lists() == ['bengali', 'english', 'hindi']
  for name in words.builtin_lists():
    assert len(words.load_list(name)) > 10


@pytest.mark.parametrize('scheme', romanise.SCHEMES)
def test_no_letter_of_hindi_or_bengali_is_left(scheme):
  for text in ('क़ख़ग़ज़ड़ढ़फ़ ऑफ कॉफ़ी हँसी दुःख नहीं १२३।',
               'আমায় বড় গাঢ় হঠাৎ দুঃখ চাঁদ রং ১২।'):
    assert romanise.leftover(romanise.romanise(text, scheme)) == []
    apart = unicodedata.normalize('NFD', text)
    assert romanise.romanise(apart, scheme) == romanise.romanise(text, scheme)


def test_cells_of_tables():
  log = table.ChangeLog()
  rows = _rows({'lines': ['a<br>b', 'c']}, {'lines': 'a<br>b'}, {'lines': 7},
               {'lines': []}, {'lines': None})
  table.apply_text(rows, log, 'html', ['lines'], characters.strip_html, 'why')
  assert [row.fields['lines'] for row in rows] == [
      ['a', 'b', 'c'], 'a\nb', 7, [], None]
  assert rows[0].read == {'lines': ['a<br>b', 'c']}
  assert [(c.where, c.before, c.after) for c in log.changes] == [
      ('f:1', ['a<br>b', 'c'], ['a', 'b', 'c']), ('f:2', 'a<br>b', 'a\nb')]
  log = table.ChangeLog()  # Missing cells are filled from their group.
  rows = _rows(
      {'song': 'Rain', 'poet': 'Ada'}, {'song': ' rain ', 'poet': '  '},
      {'song': 'Sun', 'poet': None}, {'song': 'Fog', 'poet': 'A'},
      {'song': 'Fog', 'poet': 'B'}, {'song': 'Fog', 'poet': ''},
      {'song': '', 'poet': 'C'}, {'song': '', 'poet': ''})
  table.fill_missing(rows, log, {'poet': 'song'})
  assert [row.fields['poet'] for row in rows] == [
      'Ada', 'Ada', None, 'A', 'B', '', 'C', '']
  assert [(c.where, c.before, c.why) for c in log.changes] == [
      ('f:2', '  ', 'from f:1, of the same song')]
  assert log.notes == [
      'fill: f:6 has no poet, and the rows of its song disagree: A, B']
  log = table.ChangeLog()  # Rows that lack too much are removed.
  rows = _rows({'text': 'a\nb', 'poet': 'p', 'year': 1},
               {'text': ' \n', 'poet': 'p'}, {'text': 'a\n\nb', 'poet': ''},
               {'text': 'a\n \n', 'poet': 'p', 'year': 0})
  kept = table.remove_incomplete(
      rows, log, required=['text'], max_missing=0.5, min_lines=2,
      text=['text'], known=['text', 'poet', 'year'])
  assert [row.where for row in kept] == ['f:1']
  assert [(r.where, r.why) for r in log.removals] == [
      ('f:2', 'no text'), ('f:3', '2 of 3 columns are missing'),
      ('f:4', '1 lines, fewer than 2')]


def _punctuated(*texts, share=0.5):
  log = table.ChangeLog()
  rows = _rows(*({'text': text} for text in texts))
  table.repair_punctuation(rows, log, ['text'], share)
  return [row.fields['text'] for row in rows], log


def test_a_couplet_gets_the_marks_of_the_other_couplets():
  (text,), log = _punctuated('एक,\nदो।\n' * 3 + 'तीन\nचार\n\nपाँच,\nछह॥')
  assert text == 'एक,\nदो।\n' * 3 + 'तीन,\nचार।\n\nपाँच,\nछह॥'
  assert log.changes[0].why == (
      '4 of 4 comparable lines of the text end with a mark')
  # Only the second lines have marks: the first ones stay without.
  (text,), _ = _punctuated('एक\nदो।\n' * 4 + 'तीन\nचार')
  assert text == 'एक\nदो।\n' * 4 + 'तीन\nचार।'
  (lines,), _ = _punctuated(['春眠。'] * 7 + ['夜來'])
  assert lines == ['春眠。'] * 7 + ['夜來。']
  # Verse without marks stays without.
  for texts in (['एक दिल\nदो दिल।\nतीन दिल\nचार दिल'] * 9,
                ['a.\nb.\nc.\nd.\ne']):
    assert _punctuated(*texts)[0] == texts
  whole = ['It is one.'] * 9 + ['Is it?']  # A text gets the mark of the column.
  texts, log = _punctuated(
      *whole, 'It is two', 'It goes on:', 'It “ends”', 'दिल', share=0.7)
  assert texts == [*whole, 'It is two.', 'It goes on:', 'It “ends”.', 'दिल']
  assert [(c.where, c.why) for c in log.changes] == [
      (where, '10 of 13 comparable lines of the column end with a mark')
      for where in ('f:11', 'f:13')]
  assert not _punctuated(*whole, 'It is two', 'a', 'b', share=0.8)[1].changes


def test_duplicates_and_likeness():
  log = table.ChangeLog()
  rows = _rows(
      {'text': _VERSE, 'poet': ''}, {'text': _VERSE.upper() + '!', 'poet': 'p'},
      {'text': 'quite another song about winter', 'poet': 'p'},
      {'text': '', 'poet': 'p'}, {'text': '', 'poet': 'p'})
  kept = duplicates.remove_duplicates(rows, log, ['text'], 0.7, 3)
  assert [row.where for row in kept] == ['f:2', 'f:3', 'f:4', 'f:5']
  (removal,) = log.removals
  assert removal.where == 'f:1' and removal.why == '100% the same as f:2'
  assert removal.fields == {'text': _VERSE, 'poet': ''}
  # Similar pairs are exact.
  texts = [f'{_VERSE} {end}' for end in ('now', 'today', 'and there it is')]
  pairs = duplicates.similar_pairs([*texts, 'x y z', ''], 0.5, 3)
  sets = [words.shingles(text, 3) for text in texts]
  for i, j, likeness in pairs:
    assert likeness == len(sets[i] & sets[j]) / len(sets[i] | sets[j])
  assert {(i, j) for i, j, _ in pairs} == {(0, 1), (0, 2), (1, 2)}
  assert duplicates.similar_pairs(texts, 0.99, 3) == []
  # Shingles ignore case, punctuation and lines.
  same = words.shingles('Abc, d\nE!', 2)
  assert same == {'ab', 'bc', 'cd', 'de'} == words.shingles('abcde', 2)
  assert words.shingles('a', 3) == {'a'}
  assert words.shingles('?!', 3) == {'?!'}
  assert words.shingles(' ', 3) == set()
  assert 'क्षत्रि' in words.shingles('क्षत्रिय', 2)


@pytest.mark.parametrize('texts, threshold, n, kept, why', (
    # The second is like the other two, which are less like one another.
    (('abcdefghijkl', 'abcdefghijklmno', 'defghijklmno'), 0.75, 2, ['f:2'],
     'the same as f:2'),
    # A romanised copy is a duplicate, and the native text stays.
    ((romanise.romanise(_NATIVE), _NATIVE,
      'kaga re, mayake ja kaha dena, jhula maim bhi dalumgi',
      'an English song of another kind'), 0.7, 3, ['f:2', 'f:4'],
     '100% the same as f:2')))
def test_what_a_row_duplicates_is_kept(texts, threshold, n, kept, why):
  log = table.ChangeLog()
  rows = duplicates.remove_duplicates(
      _rows(*({'t': text} for text in texts)), log, ['t'], threshold, n)
  assert [row.where for row in rows] == kept
  assert why in log.removals[0].why
  assert all('f:2' in removal.why for removal in log.removals)


@pytest.mark.parametrize('columns, openings, groups', (
    (['song', 'poet'], (), [[0, 1, 2], [3], [4], [5]]),
    (['song'], [(3, 5, 1.0)], [[0, 1], [2], [3, 5], [4]]),
    ([], (), [[i] for i in range(6)])))
def test_groups_join_over_all_columns_and_openings(columns, openings, groups):
  rows = _rows(*({'song': song, 'poet': poet} for song, poet in zip(
      ('A', 'a ', 'B', 'C', 'D', 'E'), ('p', 'q', 'Q', '', '', 'r'))))
  assert splits.groups(rows, columns, openings) == groups


@_FEW
@hypothesis.given(
    cells=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)),
                   min_size=1, max_size=40),
    fractions=st.sampled_from([(.8, .1, .1), (1., 0., 0.), (.5, .5, 0.),
                               (0.34, 0.33, 0.33)]),
    seed=st.integers(0, 9))
def test_every_row_is_in_one_split_with_its_group(cells, fractions, seed):
  rows = _rows(*({'song': f's{s}', 'style': f't{t}'} for s, t in cells))
  members = splits.groups(rows, ['song'])
  parts = splits.split(rows, members, fractions, 'style', seed)
  assert sorted(i for part in parts.values() for i in part) == list(
      range(len(rows)))
  for group in members:
    assert sum(bool(set(group) & set(part)) for part in parts.values()) == 1
  used = [bool(part) for part in parts.values()]
  assert used == [f > 0 for f in fractions] or len(members) < sum(
      f > 0 for f in fractions)
  assert parts == splits.split(rows, members, fractions, 'style', seed)


def test_splits():
  first = 'a long and winding opening of a song'
  parts = {
      'train': _rows({'song': 'A', 'text': f'{first}\nx\ny'},
                     {'song': 'B', 'text': 'other words altogether\nz'}),
      'test': _rows({'song': 'a', 'text': 'nothing of this is there\nw'},
                    {'song': 'C', 'text': f'{first.upper()}\nu\nv'}, start=3)}
  found = splits.leaks(parts, ['song'], ['text'], 1, 0.7, 3)
  assert [(leak.where, leak.other) for leak in found] == [
      ('f:1', 'f:3'), ('f:1', 'f:4')]
  assert found[0].why == "song is 'a' in both"
  assert (found[0].split, found[0].other_split) == ('train', 'test')
  for text, num_lines, opening in (
      ('one long line\nsecond long line\nthird', 2,
       'one long line\nsecond long line'),
      ('a long line of prose with many more words', 1,
       'a long line of prose with'), ('oh my\nlove', 2, '')):
    row, = _rows({'text': text})
    assert splits.opening(row, ['text'], num_lines) == opening
  # Styles are in proportion.
  rows = _rows(*({'style': 'big'},) * 80, *({'style': 'small'},) * 20)
  members = splits.groups(rows, [])
  parts = splits.split(rows, members, (0.8, 0.1, 0.1), 'style', 0)
  for name, big, small in (
      ('train', 64, 16), ('validation', 8, 2), ('test', 8, 2)):
    styles = [rows[i].fields['style'] for i in parts[name]]
    assert (styles.count('big'), styles.count('small')) == (big, small)
  assert parts != splits.split(rows, members, (0.8, 0.1, 0.1), 'style', 1)


def _augmented(method, fields, log=None, **kwargs):
  arguments = dict(share=1.0, names=['text'], templates=(), keep=(), seed=0)
  return augment.augment(_rows(*fields), log or table.ChangeLog(),
                         methods=[method], **(arguments | kwargs))


def test_methods_of_augmentation():
  # Couplets or stanzas change places between the first and the last.
  (row,) = _augmented('line_order', [{'text': _SONG}])
  lines = row.fields['text']
  assert sorted(lines) == sorted(_SONG) and lines != _SONG
  assert lines[:2] == _SONG[:2] and lines[-2:] == _SONG[-2:]
  for i in range(0, 10, 2):  # Couplets stay whole.
    assert lines.index(f'line {i + 1}') == lines.index(f'line {i}') + 1
  assert row.fields['augmented'] == 'line_order'
  assert row.fields['augmented_from'] == 'f:1'
  text = '\n\n'.join(f'a{i}\nb{i}\nc{i}' for i in range(5))
  (row,) = _augmented('line_order', [{'text': text}])
  assert sorted(row.fields['text'].split('\n\n')) == text.split('\n\n')
  assert row.fields['text'] != text
  (row,) = _augmented('span_dropout', [{'text': _SONG}])  # A span is left out.
  assert len(row.fields['text']) == 8
  assert [x for x in _SONG if x in row.fields['text']] == row.fields['text']
  words_ = [f'w{i}' for i in range(20)]
  (row,) = _augmented('span_dropout', [{'text': ' '.join(words_)}])
  left = row.fields['text'].split()
  assert len(left) == 17 and (left[0], left[-1]) == ('w0', 'w19')
  # A template paraphrases.
  (row,) = _augmented('paraphrase', [{'text': 'x', 'term': 'rizz'}],
                      templates=['text={term} stands for {text}{gone}'])
  assert row.fields['text'] == 'rizz stands for x'
  augment.check_templates(['text={term}'], ['text', 'term'])
  for bad in ('text', 'nope={text}', 'text={nope}', 'text={', 'text={}'):
    with pytest.raises(errors.UserError, match='augment_templates'):
      augment.check_templates([bad], ['text', 'term'])


def test_seeds_and_kept_phrases():
  fields = [{'text': [f'{j} {i}' for i in range(12)]} for j in range(30)]

  def made(seed):
    rows = _augmented('line_order', fields, share=0.5, seed=seed)
    return [row.fields for row in rows]

  assert made(3) == made(3) != made(4)
  assert 5 < len(made(3)) < 25
  # The source rows are not written to.
  assert fields[0] == {'text': [f'0 {i}' for i in range(12)]}
  # Kept phrases are not moved or left out.
  keep = [f'line {i}' for i in (2, 4, 6)]
  for method in ('line_order', 'span_dropout'):
    assert _augmented(method, [{'text': _SONG}], keep=keep) == []
  for seed in range(20):
    (row,) = _augmented('span_dropout', [{'text': ' '.join(_SONG)}],
                        keep=['4 line 5'], seed=seed)
    assert '4 line 5' in row.fields['text']
  log = table.ChangeLog()
  assert _augmented('line_order', [{'text': 'a\nb\nc'}], log) == []
  assert log.notes == ['augment: line_order could not change 1 of 1 rows']


@pytest.mark.parametrize('before, after, shown', (
    ('a  b\nc', 'a b\nc', ('a␣␣b⏎c', 'a␣b⏎c')),
    ('ज\u093cरा', '\u095bरा', ('⟨U+091C U+093C⟩रा', '⟨U+095B⟩रा')),
    ('a\u200bb c', 'ab c', ('a⟨U+200B⟩b c', 'ab c')),
    (None, ['x', 'y'], ('', 'x⏎y')),
    ('x. ' * 20 + 'a<b', 'x. ' * 20 + 'ab',
     ('…' + 'x. ' * 8 + 'a<b', '…' + 'x. ' * 8 + 'ab')),
    ('a  b  c', 'a b c', ('a␣␣b␣␣c', 'a␣b c (and in 1 more places)'))))
def test_a_difference_can_be_seen(before, after, shown):
  assert report.difference(before, after) == shown


def test_the_report_is_escaped():
  sections = [report.Section('T', [
      'a <b> *c*', (('h', 'i'), [('<script>', 'x|y')])])]
  page = report.to_html(sections)
  assert '<script>' not in page and '&lt;script&gt;' in page
  markdown = report.to_markdown(sections)
  assert markdown.splitlines()[-1] == r'| \<script\> | x\|y |'
  assert r'a \<b\> \*c\*' in markdown
