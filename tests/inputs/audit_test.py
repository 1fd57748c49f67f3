"""The audit stops a run for every mistake that training would not notice."""

import dataclasses
import re

import numpy as np
import pytest

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft.inputs import audit


def _render(question, answer, tokenizer, where=''):
  return chat.render([chat.Message('user', question),
                      chat.Message('model', answer)], tokenizer, where)


@pytest.fixture
def examples(tokenizer):
  return [
      _render(*pair, tokenizer, f'train.txt:{i}') for i, pair in enumerate(
          [('Hi', 'Hello'), ('What???', 'That'), ('Who?', 'Me')], 1)]


def _check(examples, tokenizer, **settings):
  settings = dict(max_length=64, max_cut_share=0.0) | settings
  return audit.check_split('train', examples, tokenizer, **settings)


def _refused(examples, tokenizer, got, **settings):
  with pytest.raises(errors.UserError, match=got):
    _check(examples, tokenizer, **settings)


def test_good_examples_are_counted(tokenizer, examples):
  checked, report = _check(examples, tokenizer, n_control_text=2)
  for before, after in zip(examples, checked, strict=True):
    np.testing.assert_array_equal(before.tokens, after.tokens)
  assert report == audit.Report(
      split='train', n_examples=3, n_tokens=24 + 26 + 23, n_trained=6 + 4 + 3,
      n_cut=0, n_duplicates=0, n_control_text=2, longest=26)
  assert str(report) == (
      'train: 3 examples, 73 tokens, 13 trained (18%), longest 26, 2 with'
      ' control-token text (kept as ordinary text)')
  _refused([], tokenizer, 'the train split has no examples')
  _, report = _check([*examples, examples[0], examples[0]], tokenizer)
  assert report.n_duplicates == 2 and '2 duplicates' in str(report)
  # The same tokens with another mask are another example.
  mask = examples[0].loss_mask & (np.cumsum(examples[0].loss_mask) != 1)
  _, report = _check(
      [*examples, dataclasses.replace(examples[0], loss_mask=mask)], tokenizer)
  assert report.n_duplicates == 0


@pytest.mark.parametrize('row, change, got', [
    (2, lambda e: dict(tokens=np.concatenate([e.tokens[:1], e.tokens]),
                       loss_mask=np.concatenate([[False], e.loss_mask])),
     '2 BOS tokens'),
    (3, lambda e: dict(tokens=e.tokens[1:], loss_mask=e.loss_mask[1:]),
     "0 BOS tokens, the first token is '<start_of_turn>'"),
    (1, lambda e: dict(tokens=np.roll(e.tokens, 1)),
     '1 BOS tokens, the first token is'),
    (2, lambda e: dict(
        loss_mask=e.loss_mask & (np.cumsum(e.loss_mask) < e.loss_mask.sum())),
     "the last trained token is 'at'"),
    (3, lambda e: dict(loss_mask=np.zeros_like(e.loss_mask)),
     'no token is trained'),
    (1, lambda e: dict(loss_mask=np.ones_like(e.loss_mask)),
     'every token is trained')],
    ids=('doubled BOS', 'no BOS', 'BOS elsewhere', 'untrained terminator',
         'empty mask', 'full mask'))
def test_a_wrong_example_is_refused(tokenizer, examples, row, change, got):
  faulty = [dataclasses.replace(e, **change(e)) if i == row else e
            for i, e in enumerate(examples, 1)]
  _refused(faulty, tokenizer, rf'train\.txt:{row}: {got}')


def test_the_share_that_it_names_lets_the_rows_be_cut(tokenizer, examples):
  # The longest has 26 tokens: 25 of input.
  _check(examples, tokenizer, max_length=25)
  with pytest.raises(errors.UserError, match=(
      r'train\.txt:2: 25 tokens; 1 of 3 examples of train are longer'
  )) as caught:
    _check(examples, tokenizer, max_length=24)
  share = float(re.search(r'max_cut_share=([\d.]+)', caught.value.fix)[1])
  checked, report = _check(
      examples, tokenizer, max_length=24, max_cut_share=share)
  assert report.n_cut == 1 and '1 CUT at the limit' in str(report)
  assert report.longest == 26  # Before cutting.
  # An example has one token more than its input.
  assert [len(e.tokens) for e in checked] == [24, 25, 23]
  np.testing.assert_array_equal(checked[1].tokens, examples[1].tokens[:25])
  assert len(checked[1].loss_mask) == 25
  # Not if that leaves no answer.
  _refused(examples, tokenizer, r'train\.txt:1: no token is trained',
           max_length=12, max_cut_share=1.0)
  answer = 'Hello you and you and you'  # A cut through the answer.
  whole = _render('Hi', answer, tokenizer)
  [cut], _ = _check([whole], tokenizer, max_length=len(whole.tokens) - 6,
                    max_cut_share=1.0)
  # It needs no terminator, and bits per byte count what is left.
  assert int(cut.tokens[-1]) not in tokenizer.stop_ids
  kept = tokenizer.decode(cut.tokens[cut.loss_mask])
  assert answer.startswith(kept) and 0 < len(kept) < len(answer)
  assert cut.target_bytes == cut.target_characters == len(kept)
  assert whole.target_bytes == len(answer)


@pytest.mark.parametrize('disguised', (
    'What is Blop?', 'what IS blop', '  What is\n"Blop"?!',
    'Ｗｈａｔ　ｉｓ　Ｂｌｏｐ？', 'What—is—Blop…'))
def test_a_prompt_of_another_split_is_found(disguised):
  first = [('Who are you?', 'a.txt:1'), ('What is Blop?', 'a.txt:4')]
  # Validation chooses the checkpoint that test measures.
  for one, other in (('train', 'validation'), ('train', 'test'),
                     ('validation', 'test')):
    with pytest.raises(errors.UserError, match=(
        r'b\.txt:9 has the prompt of a\.txt:4; 1 of 2 prompts of'
        f' {other} are in {one}')):
      audit.check_leakage({
          'train': [('What is a Blop?', 'c.txt:1')], one: first,
          other: [('New?', 'b.txt:8'), (disguised, 'b.txt:9')]})


@pytest.mark.parametrize('prompts', (
    dict(train='What is Blop?', validation='What is a Blop?',
         test='What is the Blop?'),
    dict(test='What is Blop?'), dict(train='🦊🍇', test='☕ -> ?'),
    # Vowel signs count. Devanagari: one consonant, another vowel sign.
    dict(train='कि', test='का'),
    dict(train='กิน', test='กัน')))  # Thai: eat, together.
def test_other_prompts_are_no_leak(prompts):
  audit.check_leakage({
      split: [(prompt, split)] for split, prompt in prompts.items()})


def test_normal_form():
  assert audit.normalise(' Ｓtraße, No.１! ') == 'strasse no 1'
