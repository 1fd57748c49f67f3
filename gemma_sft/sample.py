"""Answers prompts with a run's weights, or chats with you.

    python -m gemma_sft.sample --workdir=W --prompt='What is Blop?'
    python -m gemma_sft.sample --workdir=W            # a chat; /help
    python -m gemma_sft.sample --workdir=W --base     # the untouched model
    python -m gemma_sft.sample --workdir=W --base --baseline=rag:4 --prompt=...

The flags of temperature, top-k, top-p, repetition penalty, stop texts and seed
override the run's `config.sampling`.
"""

from gemma_sft import cli

if __name__ == '__main__':
  cli.run(
      'gemma_sft.sample', cli.CONFIG, cli.WORKDIR, cli.BASE, cli.STEP,
      cli.words(
          'baseline', [], 'One way of prompting: zero, few:4 (examples of the'
          ' training split, drawn by the seed), or rag:4 (the nearest by'
          ' BM25).'),
      cli.texts(
          'prompt', None, 'Prompt to answer; may be given several times.'
          ' Without one an interactive chat begins.'),
      cli.text('system', '', 'System text.'),
      cli.real(
          'temperature', None, '0 for greedy. The default of this and of the'
          ' flags below is config.sampling of the run.'),
      cli.integer('top_k', None, 'Keep the k likeliest tokens; 0 for all.'),
      cli.real('top_p', None, 'Keep the likeliest tokens that make up p.'),
      cli.real('repetition_penalty', None, '1 for none.'),
      cli.integer('max_new_tokens', None, 'Longest answer.'),
      cli.texts(
          'stop', None, 'Text that ends an answer; may be given several'
          ' times.'),
      cli.integer('seed', None, 'Seed of the sampling.'))

import sys
from typing import Any
from typing import Callable
from typing import Sequence

from gemma_sft import chat
from gemma_sft import config as config_lib
from gemma_sft import errors
from gemma_sft.generation import generate
from gemma_sft.generation import prompting
from gemma_sft.inputs import splits
from gemma_sft.run import restore

_HELP = """  /new           forget the conversation
  /system TEXT   set the system text and start a new conversation
  /quit          leave (end of file does too)"""


def main(
    config: Any, workdir: str, base: bool, step: int,
    prompt: Sequence[str] | None, system: str, baseline: Sequence[str] = (),
    **sampling: Any) -> int:
  """Answers or chats; see the module's docstring."""
  cli.require('workdir', workdir, '--workdir=workdirs/blop')
  if config is None:
    config = cli.load_run_config(workdir)
  config = config.copy_and_resolve_references()
  config.sampling.update({
      name: tuple(value) if name == 'stop' else value
      for name, value in sampling.items() if value is not None})
  config_lib.validate(config)
  if len(baseline) > 1:
    raise errors.UserError(
        f'--baseline={",".join(baseline)}', 'one way of prompting',
        'choose one: zero, few:4 or rag:4')
  shown = prompting.parse(baseline[0] if baseline else 'zero')
  served = restore.load_weights(config, workdir, base=base, step=step)
  print(f'weights: {served.description}', file=sys.stderr)
  training = splits.read_split(config.data, 'train') if shown.n else []
  prompter = prompting.Prompter(
      shown, [served.task.to_messages(r) for r in training], config.seed)

  def reply(conversation):
    return answer(
        served, config.sampling, conversation, sys.stdout.write,
        prompter.choose(conversation),
        base and config.eval.base_prompt == 'text')

  for text in prompt or ():
    if not text.strip():
      raise errors.UserError(
          'an empty --prompt', 'a question', "--prompt='What is Blop?'")
    if len(prompt) > 1:
      print(f'> {text}')
    reply(_opening(system) + [chat.Message('user', text)])
  return 0 if prompt else _chat(reply, system)


def answer(
    served: restore.Served, sampling: Any,
    conversation: Sequence[chat.Message], write: Callable[[str], Any],
    examples: Sequence[prompting.Conversation] = (), as_text: bool = False,
) -> str:
  """Streams an answer to `write`, piece by piece, and returns it.

  The sampling is `config.sampling`; see `prompting.render` for the prompt.
  """
  prompt = prompting.render(
      served.tokenizer, examples, conversation, as_text=as_text)
  stops = [*sampling.stop, *([prompting.NEXT] if as_text else [])]
  shown = ''

  def on_tokens(_, tokens):
    nonlocal shown
    text, stopped = cut_at_stop(served.tokenizer.decode(tokens), stops)
    # A half-decoded character, or the beginning of a stop text, is held back:
    # the next tokens may change it.
    settled = text if stopped else _settled(text, stops)
    if len(settled) > len(shown):
      write(settled[len(shown):])
      sys.stdout.flush()
      shown = settled
    return stopped

  tokens = generate.generate(
      served.model, served.params, [prompt],
      generate.Sampling(
          temperature=sampling.temperature, top_k=sampling.top_k,
          top_p=sampling.top_p,
          repetition_penalty=sampling.repetition_penalty,
          max_new_tokens=sampling.max_new_tokens),
      stop_ids=served.tokenizer.stop_ids,
      vocab_size=served.tokenizer.vocab_size, batch_size=1,
      seed=sampling.seed, is_done=on_tokens)[0]
  text, _ = cut_at_stop(served.tokenizer.decode(tokens), stops)
  write(text[len(shown):] + '\n')
  return text


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
  """Returns the text before the first stop text, and whether there was one."""
  starts = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
  return (text[:min(starts)], True) if starts else (text, False)


def _settled(text, stops):
  """Returns the text without an end that may still change."""
  longest = max((len(s) for s in stops), default=1)
  for n in range(min(longest - 1, len(text)), 0, -1):
    if any(stop.startswith(text[-n:]) for stop in stops):
      return text[:-n]
  return text.rstrip('\ufffd')


def _opening(system: str) -> list[chat.Message]:
  return [chat.Message('system', system)] if system else []


def _chat(reply, system) -> int:
  print('chat with the model; /help lists the commands', file=sys.stderr)
  conversation = _opening(system)
  while True:
    try:
      line = input('> ').strip()
    except EOFError:
      print()
      return 0
    command, _, rest = line.partition(' ')
    if command in ('/quit', '/exit'):
      return 0
    if command == '/help':
      print(_HELP)
    elif command in ('/new', '/system'):
      system = rest.strip() if command == '/system' else system
      conversation = _opening(system)
    elif line.startswith('/'):
      print(f'no command {command}; /help lists them')
    elif line:
      turn = [*conversation, chat.Message('user', line)]
      text = reply(turn)
      if text.strip():
        conversation = [*turn, chat.Message('model', text)]
