"""TRL's SFTTrainer with PEFT, completion-only, without packing.

Its fused loss skips untrained positions only where Triton runs: on a CPU it
computes the loss of every position, and entropy and top-1 accuracy too.
"""

import tempfile

import datasets
import tokenizers
from tokenizers import models
import transformers
import trl

from peers import common
from peers import meter as meter_lib
from peers import torch_model


class _Ticker(transformers.TrainerCallback):

  def __init__(self, meter: meter_lib.Meter, losses: list[float]):
    self._meter, self._losses = meter, losses

  def on_train_begin(self, args, state, control, **kwargs):
    self._meter.begin()

  def on_step_end(self, args, state, control, **kwargs):
    self._meter.tick(self._losses[-1])


class _Trainer(trl.SFTTrainer):
  """Keeps each step's loss, which the log would round and average."""

  losses: list[float] = []

  def training_step(self, *args, **kwargs):
    loss = super().training_step(*args, **kwargs)
    self.losses.append(loss.item())
    return loss


def _tokenizer():
  """Returns a tokenizer that only has to pad."""
  made = tokenizers.Tokenizer(models.WordLevel(
      {'<pad>': 0, '<eos>': 1, '<bos>': 2, '<unk>': 3}, '<unk>'))
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=made, pad_token='<pad>', eos_token='<eos>',
      bos_token='<bos>', unk_token='<unk>')


def main() -> None:
  """Trains and prints the measurements."""
  spec = common.read_spec()
  ids = common.load_ids(spec)
  rows = [
      {'input_ids': row_T.tolist(), 'labels': label_T.tolist()}
      for i in range(spec.steps)
      for row_T, label_T in zip(
          ids[i % len(ids)], common.labels(spec, ids[i % len(ids)]))]
  settings = common.OPTIMIZER
  with tempfile.TemporaryDirectory() as folder:
    trainer = _Trainer(
        model=torch_model.load_base(spec),
        args=trl.SFTConfig(
            output_dir=folder, max_steps=spec.steps,
            per_device_train_batch_size=spec.rows,
            gradient_accumulation_steps=1, gradient_checkpointing=False,
            learning_rate=settings['learning_rate'],
            lr_scheduler_type='constant', warmup_steps=0,
            adam_beta1=settings['b1'], adam_beta2=settings['b2'],
            adam_epsilon=settings['eps'],
            weight_decay=settings['weight_decay'], max_grad_norm=0.0,
            optim='adamw_torch', max_length=spec.length, packing=False,
            train_sampling_strategy='sequential', logging_steps=10**6,
            # In bfloat16 the trainer keeps f32 adapters under autocast.
            bf16=spec.dtype == 'bfloat16', fp16=False,
            use_cpu=not spec.gpu, save_strategy='no', report_to='none',
            disable_tqdm=True, dataloader_num_workers=0,
            dataloader_pin_memory=spec.gpu, seed=0),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=_tokenizer(), peft_config=torch_model.lora_config())
    torch_model.fill_adapters(spec, trainer.model)
    meter = meter_lib.Meter(spec, torch_model)
    trainer.add_callback(_Ticker(meter, trainer.losses))
    trainer.train()
  meter.finish(torch_model.n_trainable(trainer.model), 'trl')


if __name__ == '__main__':
  main()
