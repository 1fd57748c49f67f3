"""Runs a Hugging Face folder in transformers and peft, for comparison.

This is a script for an interpreter that has PyTorch but not this package:

    python transformers_runtime.py REQUEST.json [REQUEST.json ...]

A request is {"folder": a model, "adapter": a PEFT folder or null, "prompts":
lists of token ids, "positions": n, "greedy_tokens": n, "conversations": lists
of {"role", "content"}, "out": path of the .npz to write}. The answer holds:

    logits_i     f32 (n, V) at the last n positions of prompt i, or at all of a
                 shorter prompt
    greedy_i     the greedy answer to prompt i, without the token that ends it
    template_i   the tokens of conversation i; the model's turn is opened if the
                 last message is the user's
    info         JSON: runtime (names and versions in one line), tied (whether
                 the output head is the embedding), end_ids

It computes in float32 on the CPU with eager attention. A tensor that does not
load is an error with one message.
"""

import importlib.metadata
import json
import os
import pathlib
import sys

import numpy as np

# Only the files of the folder are to be loaded.
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['TRANSFORMERS_VERBOSITY'] = 'error'


def _load_model(folder):
  """Returns the model, all of whose tensors come from the folder."""
  import torch
  import transformers

  # The folder is our own; nothing is downloaded, and no code in it is run.
  load = transformers.AutoModelForCausalLM.from_pretrained
  model, loaded = load(
      folder, output_loading_info=True, attn_implementation='eager',
      # Versions 4 and 5 both accept this name.
      torch_dtype=torch.float32)
  problems = [f'{kind}: {sorted(map(str, found))[:8]}'
              for kind, found in loaded.items() if found]
  if problems:
    raise SystemExit(f'{folder}: {"; ".join(problems)}')
  return model.eval()


def _add_adapter(model, folder):
  """Returns the model with all tensors of an adapter."""
  import peft
  from safetensors import torch as safetensors_torch

  file = pathlib.Path(folder) / 'adapter_model.safetensors'
  adapted = peft.PeftModel.from_pretrained(model, folder).eval()
  # If peft does not know the keys, it warns and runs an adapter of zeros.
  wanted = safetensors_torch.load_file(file)
  found = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
  missing = sorted(found.keys() - wanted.keys())
  unexpected = sorted(wanted.keys() - found.keys())
  if missing or unexpected:
    raise SystemExit(
        f'{file}: {len(missing)} adapter tensors missing: {missing[:4]};'
        f' {len(unexpected)} unexpected: {unexpected[:4]}')
  for key, tensor in wanted.items():
    if not found[key].float().equal(tensor.float()):
      raise SystemExit(f'{file}: {key} was not loaded')
  return adapted


def _greedy(model, ids, n, end_ids):
  """Returns at most n tokens, computed with the cache as `generate` does."""
  import torch

  new, cache, tokens = [], None, torch.tensor([ids])
  while len(new) < n:
    out = model(
        tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = int(out.logits[0, -1].argmax())
    if token in end_ids:
      break
    new.append(token)
    cache, tokens = out.past_key_values, torch.tensor([[token]])
  return new


def _template_tokens(tokenizer, messages):
  found = tokenizer.apply_chat_template(
      messages, tokenize=True,
      add_generation_prompt=messages[-1]['role'] == 'user')
  # A BatchEncoding from version 5 on.
  return found['input_ids'] if hasattr(found, 'keys') else found


def _answer(request):
  """Returns the arrays of one request."""
  import torch

  model = _load_model(request['folder'])
  head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
  tied = head.weight.data_ptr() == embedding.weight.data_ptr()
  end_ids = model.generation_config.eos_token_id
  end_ids = [] if end_ids is None else np.atleast_1d(end_ids).tolist()
  if request['adapter']:
    model = _add_adapter(model, request['adapter'])
  packages = ['transformers', *(['peft'] if request['adapter'] else [])]
  runtime = ', '.join(
      f'{name} {importlib.metadata.version(name)}' for name in packages)
  arrays = {'info': np.array(json.dumps({
      'runtime': runtime, 'tied': tied, 'end_ids': end_ids}))}
  for i, ids in enumerate(request['prompts']):
    out = model(torch.tensor([ids]), use_cache=False,
                logits_to_keep=request['positions'])
    arrays[f'logits_{i}'] = out.logits[0].float().numpy()
    arrays[f'greedy_{i}'] = np.array(
        _greedy(model, ids, request['greedy_tokens'], end_ids), np.int64)
  if request['conversations']:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(  # nosec B615
        request['folder'])
    for i, messages in enumerate(request['conversations']):
      arrays[f'template_{i}'] = np.array(
          _template_tokens(tokenizer, messages), np.int64)
  return arrays


def main(paths):
  """Answers each request."""
  import torch

  with torch.inference_mode():
    for path in paths:
      request = json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
      np.savez(request['out'], **_answer(request))


if __name__ == '__main__':
  main(sys.argv[1:])
