"""Uploads an export to the Hugging Face Hub or to Kaggle Models.

The services' own clients do the upload, with the login that they find: no token
is ever an argument, and a client's error message is scrubbed before it is
shown. The local files stay as they are, also after a failure.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import tempfile
from typing import Iterator
from typing import Mapping
from typing import Sequence

import huggingface_hub

from gemma_sft import errors
from gemma_sft.monitor import scrub

# Seconds for connecting, reading, writing and waiting for a connection of the
# pool. The clients' default is to wait for ever. A commit may take minutes.
_TIMEOUT_OF_LOGIN = (10.0, 30.0, 30.0, 10.0)
_TIMEOUT_OF_UPLOAD = (10.0, 600.0, 600.0, None)
# Its files go to the root of a repository, where `from_pretrained` looks.
_ROOT_FOLDER = 'hf'
# Weights that an earlier export may have left in a repository, and that the new
# card does not describe.
_OWN_FILES = re.compile(
    r'(gguf|peft)/.+|model[^/]*\.safetensors(\.index\.json)?')
# Folder of an export -> its framework and variation on Kaggle.
_KAGGLE_PARTS = {'hf': ('transformers', 'merged'),
                 'peft': ('transformers', 'adapter'),
                 'gguf': ('gguf', 'llama-cpp')}
# Names of exception classes: depending on the version, the clients use httpx,
# httpx2, requests or Rust.
_NO_NETWORK = {'TransportError', 'ConnectionError', 'TimeoutError', 'Timeout',
               'gaierror', 'OfflineModeIsEnabled'}
_REFUSED = {401: 'no valid login', 403: 'no right to write there'}
# Larger files are weights, which are not searched for the token.
_TEXT_BYTES = 4_000_000


@dataclasses.dataclass(frozen=True)
class Target:
  """Where `--push` sends an export."""

  service: str  # 'huggingface' or 'kaggle'.
  name: str  # org/name, or owner/model or owner/model/framework/variation.


def parse_target(text: str) -> Target:
  """Returns what `--push=org/name` or `--push=kaggle:owner/model` means."""
  kaggle = text.startswith('kaggle:')
  name = text.removeprefix('kaggle:')
  parts = name.split('/')
  # Names begin and end with a letter or digit; Kaggle's have no dots.
  word = r'[A-Za-z0-9]([\w-]*[A-Za-z0-9])?' if kaggle else (
      r'[A-Za-z0-9]([\w.-]{0,94}[A-Za-z0-9])?')
  fine = all(re.fullmatch(word, part, re.ASCII) for part in parts)
  if not fine or len(parts) not in ((2, 4) if kaggle else (2,)):
    raise errors.UserError(
        f'--push={scrub.scrub(text)}',
        'ORGANISATION/NAME for the Hugging Face Hub, kaggle:OWNER/MODEL or'
        ' kaggle:OWNER/MODEL/FRAMEWORK/VARIATION for Kaggle Models',
        'name one of these; logins come from the environment, never from here')
  return Target('kaggle' if kaggle else 'huggingface', name)


def hub_repository(targets: Sequence[Target]) -> str:
  """Returns the first target on the Hugging Face Hub, or ''."""
  return next((t.name for t in targets if t.service == 'huggingface'), '')


def push(folder: str | os.PathLike, target: Target, *,
         data_files: Sequence[str] = (), data_card: str = '',
         private: bool = False) -> str:
  """Uploads an export and returns its address.

  Data files, if any, become a data set of the model's name and '-data' with
  `data_card` as its README.md. New models on Kaggle are always private.

  Raises:
    UserError: There is no client, no login, no network or no right to write.
  """
  data = _data_files(data_files, data_card)
  if target.service == 'kaggle':
    return _push_kaggle(folder, target.name, data)
  return _push_hugging_face(folder, target.name, data, private)


def _push_hugging_face(folder, repo_id, data, private) -> str:
  """Uploads an export in one commit.

  The files of hf/ go to the root; all others keep their paths. The commit also
  removes weights of an earlier export that this one does not replace; they stay
  in the repository's history.
  """
  files = _hub_files(folder)
  with _explained(folder, 'the Hugging Face Hub') as secrets:
    token = huggingface_hub.get_token()
    if token is None:
      raise errors.UserError(
          'no login for the Hugging Face Hub', 'a token with write access',
          'run `hf auth login` or set HF_TOKEN, and start again')
    secrets.append(token)
    _refuse_token(token, files, data)
    api = huggingface_hub.HfApi()
    try:
      huggingface_hub.get_session().timeout = _TIMEOUT_OF_LOGIN
      api.whoami()  # Fails before anything is created if the token is wrong.
      huggingface_hub.get_session().timeout = _TIMEOUT_OF_UPLOAD
      if data:
        _commit(api, f'{repo_id}-data', 'dataset', data, private)
      return _commit(api, repo_id, 'model', files, private)
    finally:
      huggingface_hub.close_session()  # The next has the default timeouts.


def _commit(api, repo_id, repo_type, files, private):
  url = api.create_repo(
      repo_id, repo_type=repo_type, private=private, exist_ok=True)
  operations = [huggingface_hub.CommitOperationAdd(name, source)
                for name, source in files.items()]
  if repo_type == 'model':
    stale = [name for name in api.list_repo_files(repo_id)
             if _OWN_FILES.fullmatch(name) and name not in files]
    if stale:
      print(f'removing what an earlier export left in {repo_id}:'
            f' {", ".join(stale)}')
    operations += map(huggingface_hub.CommitOperationDelete, stale)
  api.create_commit(repo_id, operations, repo_type=repo_type,
                    commit_message='Export of gemma_sft')
  return str(url)


def _push_kaggle(folder, handle, data) -> str:
  """Uploads an export to Kaggle Models.

  The folders hf/, peft/ and gguf/ become a variation each. With a handle of
  owner/model/framework/variation all files go to that one, laid out as on the
  Hub. An existing variation gets a new version. No licence is set: the terms of
  Gemma are not in Kaggle's list, and the card in each variation states them.
  """
  try:
    import kagglehub  # Optional: only needed for a push.
    from kagglehub import config as kaggle_config
  except ImportError as error:
    raise errors.UserError(
        'kagglehub is not installed', 'the client of Kaggle',
        "pip install 'gemma_sft[push]'") from error
  uploads = _kaggle_uploads(folder, handle)
  owner, model = handle.split('/')[:2]
  with (_explained(folder, 'Kaggle') as secrets,
        tempfile.TemporaryDirectory() as scratch):
    login = kaggle_config.get_kaggle_credentials()
    if login is None:
      raise errors.UserError(
          'no login for Kaggle', 'an API token',
          'set KAGGLE_API_TOKEN (or KAGGLE_USERNAME and KAGGLE_KEY), or put'
          ' kaggle.json into ~/.kaggle, and start again')
    secrets.append(login.api_key or login.key)
    _refuse_token(secrets[0], *uploads.values(), data)
    _reach_kaggle()
    kagglehub.whoami(verbose=False)
    if data:
      kagglehub.dataset_upload(
          f'{owner}/{model}-data', _staged(scratch, 'data', data))
    for i, (name, files) in enumerate(uploads.items()):
      kagglehub.model_upload(name, _staged(scratch, str(i), files))
  return f'https://www.kaggle.com/models/{owner}/{model}'


def _reach_kaggle():
  """Raises an exception of `requests` if Kaggle does not answer soon.

  Kaggle's client sets no timeout, and reports a missing network as a wrong
  login.
  """
  from kagglesdk import kaggle_env  # Both come with kagglehub.
  import requests

  endpoint = kaggle_env.get_endpoint(kaggle_env.get_env())
  # There is a timeout; bandit recognises only a literal one.
  requests.head(  # nosec B113
      endpoint, timeout=_TIMEOUT_OF_LOGIN[:2])


def _kaggle_uploads(folder, handle):
  """Returns {full handle: {name: path}}."""
  if handle.count('/') == 3:
    return {handle: _hub_files(folder)}
  files = _files(folder)
  shared = {name: path for name, path in files.items() if '/' not in name}
  uploads = {}
  for part, (framework, variation) in _KAGGLE_PARTS.items():
    own = {name.removeprefix(f'{part}/'): path for name, path in files.items()
           if name.startswith(f'{part}/')}
    if own:
      uploads[f'{handle}/{framework}/{variation}'] = shared | own
  left = {name for name in files
          if '/' in name and name.split('/')[0] not in _KAGGLE_PARTS}
  if left or not uploads:
    raise errors.UserError(
        f'{folder}: ' + (f'{min(left)} belongs to no part of an export'
                         if left else 'nothing to upload'),
        f'the folders of an export: {list(_KAGGLE_PARTS)}',
        'push what `gemma_sft.export` wrote, or name framework and variation')
  return uploads


def _staged(scratch, name, files):
  """Returns a folder of links to files, because the client uploads folders."""
  root = pathlib.Path(scratch, name)
  for path, source in files.items():
    link = root / path
    link.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
      link.write_bytes(source)
    else:
      link.symlink_to(os.path.abspath(source))
  return str(root)


def _files(folder) -> dict[str, str]:
  """Returns {path relative to the folder, with slashes: path}."""
  root = pathlib.Path(folder)
  files = {path.relative_to(root).as_posix(): str(path)
           for path in sorted(root.rglob('*')) if path.is_file()}
  if not files:
    raise errors.UserError(
        f'{folder}: ' + ('no files' if root.is_dir() else 'no such folder'),
        'a finished export', 'run `python -m gemma_sft.export` first')
  return files


def _hub_files(folder):
  files = {}
  for name, path in _files(folder).items():
    place = name.removeprefix(f'{_ROOT_FOLDER}/')
    if place in files:
      raise errors.UserError(
          f'{folder}: {place} is there and in {_ROOT_FOLDER}/',
          'one file for each place in the repository', 'remove one of them')
    files[place] = path
  return files


def _data_files(data_files, data_card) -> dict[str, str | bytes]:
  files = {}
  for path in data_files:
    name = os.path.basename(path)
    if not os.path.isfile(path) or name in files or name == 'README.md':
      raise errors.UserError(
          f'{path}: ' + ('no such file' if not os.path.isfile(path)
                         else 'a second file of this name'),
          'files of the data set, each of another name',
          'correct the list, or rename the file')
    files[name] = path
  return files | {'README.md': data_card.encode()} if files else {}


def _refuse_token(token: str, *files: Mapping[str, str | bytes]):
  """Raises UserError if a text to be published contains the login."""
  for name, source in itertools.chain.from_iterable(f.items() for f in files):
    content = b''
    if isinstance(source, bytes):
      content = source
    elif os.path.getsize(source) <= _TEXT_BYTES:
      content = pathlib.Path(source).read_bytes()
    if token and token.encode() in content:
      raise errors.UserError(
          f'{name} contains the token of this login', 'files without secrets',
          'remove it there, and revoke the token: it has been written to disk')


@contextlib.contextmanager
def _explained(folder, service) -> Iterator[list[str]]:
  """Turns a client's exception into one UserError without secrets.

  Yields a list, to which the caller adds secrets that are not in the
  environment.
  """
  secrets = []
  try:
    yield secrets
  except errors.UserError:
    raise
  # The clients raise exceptions of four libraries, the Rust one bare ones.
  except Exception as error:
    got, fix = _reason(_chain(error), service, secrets)
    # Not `from error`: its text may hold the secrets.
    raise errors.UserError(f'{got}; the files stay in {folder}',
                           f'an upload to {service}', fix) from None


def _reason(chain, service, secrets):
  first, last = (
      ' '.join(text.split()) for text in scrub.scrub(
          [str(error) or type(error).__name__
           for error in (chain[0], chain[-1])], secrets))
  responses = [getattr(error, 'response', None) for error in chain]
  status = next(filter(None, (
      getattr(response, 'status_code', None) for response in responses)), None)
  classes = {c.__name__ for error in chain for c in type(error).__mro__}
  if status is None and classes & _NO_NETWORK:
    return (f'{service} cannot be reached ({last})',
            'push again with a network, or upload the folder by hand')
  if type(chain[0]).__name__ == 'UnauthenticatedError':  # kagglehub.whoami.
    status = 401
  if status in _REFUSED:
    return (f'{service} refused, {_REFUSED[status]}: {first}',
            'check the token and its rights, then push again')
  return f'{service}: {first}', 'correct this, then push again'


def _chain(error):
  chain = []
  while error is not None and error not in chain:
    chain.append(error)
    error = error.__cause__ or error.__context__
  return chain
