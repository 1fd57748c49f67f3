"""Loads each exported file in its own runtime and compares it with JAX."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from gemma_sft import errors
from gemma_sft.exports import divergence as divergence_lib
from gemma_sft.exports import llama_runtime
from gemma_sft.exports import reference as reference_lib

_SCRIPT = pathlib.Path(__file__).with_name('transformers_runtime.py')
_ENVIRONMENT = pathlib.Path('.venv-runtimes/bin/python')


@dataclasses.dataclass(frozen=True)
class Proof:
  """The result of running one exported file in its runtime."""

  runtime: str  # Name and version.
  divergence: divergence_lib.Divergence
  # Conversation -> whether its tokens are those of training.
  templates: dict[str, bool]

  @property
  def passed(self) -> bool:
    return self.divergence.passed and all(self.templates.values())


def find_python(path: str | None) -> str:
  """Returns an interpreter that has torch, transformers and peft.

  It is the given one, else that of .venv-runtimes (launch/runtimes.sh makes
  it), else this one.

  Raises:
    UserError: The interpreter lacks one of the packages.
  """
  candidate = path or str(
      _ENVIRONMENT if _ENVIRONMENT.exists() else sys.executable)
  try:
    subprocess.run(
        [candidate, '-c', 'import peft, torch, transformers'],
        capture_output=True, text=True, check=True)
    return candidate
  except OSError as error:
    problem = str(error)
  except subprocess.CalledProcessError as error:
    problem = error.stderr.strip().splitlines()[-1]
  raise errors.UserError(
      f'{candidate} cannot run transformers and peft: {problem}',
      'an interpreter with torch, transformers and peft, to prove hf and peft',
      'bash launch/runtimes.sh makes one; or name one with --runtime_python, or'
      ' accept an unproven export with --allow_unproven')


def prove_hf(
    folder: pathlib.Path, reference: reference_lib.Reference, *, kind: str,
    program: str, adapter: pathlib.Path | None = None) -> Proof:
  """Proves a Hugging Face folder, or a PEFT adapter on top of one.

  `kind` is a key of `divergence.LIMITS`, `program` is from `find_python`.

  Raises:
    UserError: The runtime could not load the folder; the message ends with the
      runtime's last lines.
  """
  found = _run_transformers(folder, adapter, reference, program)
  n = len(reference.prompts)
  info = json.loads(str(found['info']))
  if not info['tied']:
    raise errors.UserError(
        f'{folder}: {info["runtime"]} gives the model an output head of its'
        ' own', 'the embedding as the head, as in Gemma',
        'set tie_word_embeddings to true in config.json')
  divergence = divergence_lib.compare(
      reference.logits, [found[f'logits_{i}'] for i in range(n)],
      reference.greedy, [found[f'greedy_{i}'].tolist() for i in range(n)],
      kind=kind, along_greedy=reference.along_greedy)
  templates = {} if adapter else {
      name: found[f'template_{i}'].tolist() == ids
      for i, (name, _, ids) in enumerate(reference.conversations)}
  return Proof(info['runtime'], divergence, templates)


def _run_transformers(folder, adapter, reference, python):
  """Returns the arrays that `transformers_runtime` answers with, by name."""
  with tempfile.TemporaryDirectory() as scratch:
    out = os.path.join(scratch, 'out.npz')
    request = pathlib.Path(scratch, 'request.json')
    conversations = [messages for _, messages, _ in reference.conversations]
    request.write_text(json.dumps({
        'folder': str(folder), 'adapter': str(adapter) if adapter else None,
        'prompts': reference.prompts, 'positions': reference_lib.POSITIONS,
        'greedy_tokens': reference_lib.GREEDY_TOKENS,
        'conversations': [] if adapter else conversations, 'out': out}))
    # Offline, to prove the files of the folder alone.
    process = subprocess.run(
        [python, str(_SCRIPT), str(request)], capture_output=True, text=True,
        check=False, env={
            **os.environ, 'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_OFFLINE': '1'})
    if process.returncode:
      raise errors.UserError(
          f'{adapter or folder} cannot be loaded: '
          + '\n  '.join(process.stderr.strip().splitlines()[-5:]),
          'a folder that transformers and peft load',
          'the unproven files are still there; report this with the lines'
          ' above')
    with np.load(out) as arrays:
      return dict(arrays)


def prove_gguf(
    path: pathlib.Path, reference: reference_lib.Reference, *, kind: str,
    program: str, adapter: pathlib.Path | None = None) -> Proof:
  """Proves a GGUF, or a LoRA GGUF on top of one, in llama-server.

  The server gives the distribution after a prompt, not at every position.
  `kind` is a key of `divergence.LIMITS`, `program` is from
  `llama_runtime.find_server`.
  """
  longest = max(map(len, reference.prompts))
  with llama_runtime.Server(
      program, path, lora=adapter,
      context_length=longest + 2 * reference_lib.GREEDY_TOKENS) as running:
    logprobs = [running.logprobs(ids)[None] for ids in reference.prompts]
    greedy = [running.greedy(ids, reference_lib.GREEDY_TOKENS)
              for ids in reference.prompts]
    templates = {} if adapter else {
        name: _served_tokens(running, messages, ids[0]) == ids
        for name, messages, ids in reference.conversations}
    version = running.version
  divergence = divergence_lib.compare(
      [logits[-1:] for logits in reference.logits], logprobs,
      reference.greedy, greedy, kind=kind, along_greedy=reference.along_greedy)
  return Proof(version, divergence, templates)


def _served_tokens(running, messages, bos) -> list[int]:
  """Returns the tokens that the server makes of a conversation."""
  text = running.apply_template(messages)
  return [bos, *running.tokenize(text, parse_special=True)]
