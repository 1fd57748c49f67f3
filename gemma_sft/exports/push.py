"""Uploads of an export to the Hugging Face Hub and to Kaggle Models.

Through their own clients, whose logins are the only ones used: no token is an
argument, and what a client says when it fails is scrubbed before it is shown.
Nothing here changes the export: after a failure the files are where they were.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
from typing import Iterator
from typing import Mapping
from typing import Sequence

from gemma_sft import errors
from gemma_sft.monitor import scrub

# Seconds for connecting, reading, writing and a place in the pool. The clients'
# own default is to wait for ever. A commit may well be silent for minutes.
_TIMEOUT_OF_LOGIN = (10.0, 30.0, 30.0, 10.0)
_TIMEOUT_OF_UPLOAD = (10.0, 600.0, 600.0, None)
# hf/ lies at the root of a repository, where `from_pretrained` looks.
_ROOT_FOLDER = 'hf'
# What an earlier export may have left in a repository: weights that the new
# card does not describe.
_OWN_FILES = re.compile(
    r'(gguf|peft)/.+|model[^/]*\.safetensors(\.index\.json)?')
# Kaggle keeps frameworks apart: framework and variation of each folder.
_KAGGLE_PARTS = {'hf': ('transformers', 'merged'),
                 'peft': ('transformers', 'adapter'),
                 'gguf': ('gguf', 'llama-cpp')}
# Named by class: the clients use httpx, httpx2, requests or Rust, by version.
_NO_NETWORK = {'TransportError', 'ConnectionError', 'TimeoutError', 'Timeout',
               'gaierror', 'OfflineModeIsEnabled'}
_REFUSED = {401: 'no valid login', 403: 'no right to write there'}
_TEXT_BYTES = 4_000_000


@dataclasses.dataclass(frozen=True)
class Target:
  """Where `--push` sends an export.

  Attributes:
    service: 'huggingface' or 'kaggle'.
    name: org/name, or owner/model or owner/model/framework/variation.
  """

  service: str
  name: str


def parse_target(text: str) -> Target:
  """Returns what `--push=org/name` or `--push=kaggle:owner/model` means."""
  kaggle = text.startswith('kaggle:')
  name = text.removeprefix('kaggle:')
  parts = name.split('/')
  # Both begin and end with a letter or a digit; Kaggle's have no dots.
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


def push(
    folder: str | os.PathLike, target: Target, *,
    data_files: Sequence[str] = (), data_card: str = '', private: bool = False,
) -> str:
  """Uploads an export to where the target is and returns its address."""
  if target.service == 'kaggle':
    return push_kaggle(folder, target.name, data_files=data_files,
                       data_card=data_card)
  return push_hugging_face(folder, target.name, data_files=data_files,
                           data_card=data_card, private=private)


def push_hugging_face(
    folder: str | os.PathLike, repo_id: str, *, data_files: Sequence[str] = (),
    data_card: str = '', private: bool = False) -> str:
  """Uploads an export in one commit and returns the repository's address.

  hf/ goes to the root, all else keeps its place. Weights of an earlier export
  in that repository that this one does not bring are removed in the same
  commit; the Hub's history keeps them.

  Args:
    folder: The finished export.
    repo_id: org/name; made if it is not there.
    data_files: If any: uploaded to the data set repository org/name-data.
    data_card: README.md of that repository.
    private: Of repositories that are made now.

  Raises:
    UserError: without the client, a login, a network or the right to write.
  """
  try:
    import huggingface_hub  # Optional: only needed for a push.
  except ImportError as error:
    raise _no_client('huggingface_hub') from error
  files = _hub_files(folder)
  data = _data_files(data_files, data_card)
  with _explained(folder, 'the Hugging Face Hub') as secrets:
    token = huggingface_hub.get_token()
    if token is None:
      raise errors.UserError(
          'no login for the Hugging Face Hub', 'a token with write access',
          'run `hf auth login` or set HF_TOKEN, and start again')
    secrets.append(token)
    _refuse_token(files | data, token)
    api = huggingface_hub.HfApi()
    try:
      huggingface_hub.get_session().timeout = _TIMEOUT_OF_LOGIN
      api.whoami()  # Before anything is made: is the token accepted?
      huggingface_hub.get_session().timeout = _TIMEOUT_OF_UPLOAD
      if data:
        _commit(
            huggingface_hub, api, f'{repo_id}-data', 'dataset', data, private)
      return _commit(huggingface_hub, api, repo_id, 'model', files, private)
    finally:
      huggingface_hub.close_session()  # The next has the client's timeouts.


def _commit(client, api, repo_id, repo_type, files, private):
  url = api.create_repo(
      repo_id, repo_type=repo_type, private=private, exist_ok=True)
  operations = [
      client.CommitOperationAdd(path_in_repo=name, path_or_fileobj=source)
      for name, source in files.items()]
  if repo_type == 'model':
    stale = [name for name in api.list_repo_files(repo_id)
             if _OWN_FILES.fullmatch(name) and name not in files]
    if stale:
      print(f'removing what an earlier export left in {repo_id}:'
            f' {", ".join(stale)}')
    operations += [client.CommitOperationDelete(path_in_repo=name)
                   for name in stale]
  api.create_commit(repo_id, operations, repo_type=repo_type,
                    commit_message='Export of gemma_sft')
  return str(url)


def push_kaggle(
    folder: str | os.PathLike, handle: str, *, data_files: Sequence[str] = (),
    data_card: str = '', licence: str | None = None) -> str:
  """Uploads an export to Kaggle Models and returns the model's address.

  What is not there yet is made, and made private, by Kaggle's client; a
  variation that is there gets a new version.

  Args:
    folder: The finished export.
    handle: owner/model: hf/, peft/ and gguf/ become a variation each. Or
      owner/model/framework/variation: all files go there, laid out as on the
      Hub.
    data_files: If any: uploaded as the data set owner/model-data.
    data_card: README.md of that data set.
    licence: A name that Kaggle knows. Gemma's terms are not in its list; the
      card, uploaded with each variation, states them.

  Raises:
    UserError: without the client, a login, a network or the right to write.
  """
  try:
    import kagglehub  # Optional: only needed for a push.
    from kagglehub import config as kaggle_config
  except ImportError as error:
    raise _no_client('kagglehub') from error
  uploads = _kaggle_uploads(folder, handle)
  data = _data_files(data_files, data_card)
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
    for files in (*uploads.values(), data):
      _refuse_token(files, secrets[0])
    _reach_kaggle()
    kagglehub.whoami(verbose=False)
    if data:
      kagglehub.dataset_upload(
          f'{owner}/{model}-data', _staged(scratch, 'data', data))
    for i, (name, files) in enumerate(uploads.items()):
      kagglehub.model_upload(name, _staged(scratch, str(i), files), licence)
  return f'https://www.kaggle.com/models/{owner}/{model}'


def _reach_kaggle():
  """Raises what `requests` raises if Kaggle does not answer soon.

  Kaggle's client sets no timeout of its own, and calls a missing network a
  wrong login.
  """
  from kagglesdk import kaggle_env  # Both come with kagglehub.
  import requests

  # It has a timeout, on the next line.
  requests.head(  # nosec B113
      kaggle_env.get_endpoint(kaggle_env.get_env()),
      timeout=_TIMEOUT_OF_LOGIN[:2])


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
  """Returns a folder of links: the client uploads folders, copies are big."""
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
  """Returns {path in the folder, with slashes: path} of all its files."""
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


def _refuse_token(files: Mapping[str, str | bytes], token: str):
  """Raises UserError if a text that would be published holds the login."""
  for name, source in files.items():
    if isinstance(source, bytes):
      content = source
    elif os.path.getsize(source) <= _TEXT_BYTES:  # Weights are larger.
      content = pathlib.Path(source).read_bytes()
    else:
      continue
    if token and token.encode() in content:
      raise errors.UserError(
          f'{name} contains the token of this login', 'files without secrets',
          'remove it there, and give that token back: it has been written to'
          ' disk')


def _no_client(name):
  return errors.UserError(
      f'{name} is not installed', 'the client of the service to push to',
      "pip install 'gemma_sft[push]'")


@contextlib.contextmanager
def _explained(folder, service) -> Iterator[list[str]]:
  """Turns what a client raises into one UserError without secrets.

  Yields a list for secrets that the environment does not hold.
  """
  secrets = []
  try:
    yield secrets
  except errors.UserError:
    raise
  # They raise from four libraries, bare exceptions of the Rust one included.
  except Exception as error:
    got, fix = _reason(_chain(error), service, secrets)
    # Not `from error`: its text may hold what was just scrubbed.
    raise errors.UserError(
        f'{got}; the files stay in {folder}', f'an upload to {service}', fix
    ) from None


def _reason(chain, service, secrets):
  first, last = (
      ' '.join(text.split()) for text in scrub.scrub(
          [str(error) or type(error).__name__
           for error in (chain[0], chain[-1])], secrets))
  status = next((s for s in map(_status, chain) if s), None)
  if status is None and any(map(_is_network, chain)):
    return (f'{service} cannot be reached ({last})',
            'push again with a network, or upload the folder by hand')
  if type(chain[0]).__name__ == 'UnauthenticatedError':  # kagglehub.whoami.
    status = 401
  if status in _REFUSED:
    return (f'{service} refused, {_REFUSED[status]}: {first}',
            'check the token and its rights, then push again')
  return f'{service}: {first}', 'mend this, then push again'


def _chain(error):
  chain = []
  while error is not None and error not in chain:
    chain.append(error)
    error = error.__cause__ or error.__context__
  return chain


def _status(error):
  return getattr(getattr(error, 'response', None), 'status_code', None)


def _is_network(error):
  return any(c.__name__ in _NO_NETWORK for c in type(error).__mro__)
