"""A hand-written training loop over transformers and PEFT.

`peft_completion` runs the head over the trained positions alone, the fastest
that these libraries allow without a new kernel. `peft_full` computes all
logits, as most examples do.
"""

import peft
import torch
from torch.nn import functional as F

from peers import common
from peers import meter
from peers import torch_model


def main() -> None:
  """Trains and prints the measurements."""
  spec = common.read_spec()
  model = peft.get_peft_model(
      torch_model.load_base(spec), torch_model.lora_config())
  torch_model.fill_adapters(spec, model)
  model.train()
  settings = common.OPTIMIZER
  optimizer = torch.optim.AdamW(
      [p for p in model.parameters() if p.requires_grad],
      lr=settings['learning_rate'], betas=(settings['b1'], settings['b2']),
      eps=settings['eps'], weight_decay=settings['weight_decay'])
  place = torch_model.device(spec)
  batches = [
      (torch.from_numpy(ids_BT).long().to(place),
       torch.from_numpy(common.labels(spec, ids_BT)).long().to(place))
      for ids_BT in common.load_ids(spec)]
  causal = model.get_base_model()
  decoder = causal.model
  if spec.compiled:
    decoder = torch.compile(decoder)

  def loss(ids_BT, labels_BT):
    x_BTD = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
    targets_BT = labels_BT[:, 1:]
    if spec.peer == 'peft_completion':
      mask_BT = targets_BT >= 0
      x_BTD, targets_BT = x_BTD[mask_BT], targets_BT[mask_BT]
    logits_BTV = causal.lm_head(x_BTD)
    return F.cross_entropy(
        logits_BTV.float().flatten(0, -2), targets_BT.flatten(),
        ignore_index=-100)

  def step(i):
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(place, torch.bfloat16, enabled=spec.autocast):
      value = loss(*batches[i])
    value.backward()
    optimizer.step()
    return value.item()

  meter.measure(spec, torch_model, step, torch_model.n_trainable(model))


if __name__ == '__main__':
  main()
