"""Chat templates for other runtimes, made from the tables of `chat`.

Each renders the text that `chat.render` and `chat.render_prompt` tokenise, so
that a served model reads the prompts that it was tuned on.
"""

from gemma_sft import chat
from gemma_sft import errors

# `{%-` eats the white space before it, so that the result is the same with and
# without Jinja's trim_blocks. Only filters and tests that llama.cpp's own
# Jinja knows too; it has no BOS for {{ bos_token }}, it adds one by itself. A
# prompt after a turn of the model is rendered, where `chat.render_prompt`
# refuses: llama.cpp tries that out, and serves no template that raises.
_JINJA = """\
{{ bos_token }}
{%- set turns = messages %}
{%- set before = '' %}
{%- if messages and messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is not string or not \
(messages[0]['content'] | trim) %}
        {{- raise_exception('the system text is empty or no text') }}
    {%- endif %}
    @SYSTEM@
    {%- set turns = messages[1:] %}
{%- endif %}
{%- if not turns %}
    {{- raise_exception('the conversation has no user turn') }}
{%- endif %}
{%- for message in turns %}
    {%- set role = message['role'] %}
    {%- if role == 'assistant' %}
        {%- set role = 'model' %}
    {%- endif %}
    {%- if role != ('user' if loop.index0 % 2 == 0 else 'model') %}
        {{- raise_exception('user and assistant take turns, after the system \
text if there is one; wrong is the role ' + role) }}
    {%- endif %}
    {%- if message['content'] is not string or not \
(message['content'] | trim) %}
        {{- raise_exception('the content of a turn is empty or no text') }}
    {%- endif %}
    {{- '@START@' + role + '\\n' + (before if loop.first else '') }}
    {{- (message['content'] | trim) + '@END@\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '@START@model\\n' }}
{%- endif %}"""
_JINJA_SYSTEM_TEXT = """\
{%- set before = (messages[0]['content'] | trim) + '\\n\\n' %}"""
_JINJA_SYSTEM_TURN = """\
{{- '@START@system\\n' + (messages[0]['content'] | trim) + '@END@\\n' }}"""

# Go's text/template has no way to strip a text or to stop with a message, so
# in Ollama contents keep the white space at their ends, an empty text renders
# as an empty turn, and messages of roles other than user and assistant (tool)
# render as nothing. Before this template runs, Ollama itself joins system
# texts into .System and neighbours of one role into one message, a blank line
# between. A conversation that ends with the assistant is left open: that is
# how Ollama's clients have an answer continued.
_OLLAMA = """\
{{- $system := .System }}
{{- range $i, $_ := .Messages }}
{{- $last := eq (len (slice $.Messages $i)) 1 }}
{{- if eq .Role "user" }}@START@user
@SYSTEM@{{ .Content }}@END@
{{ else if eq .Role "assistant" }}@START@model
{{ .Content }}{{ if not $last }}@END@
{{ end }}{{ end }}
{{- if and $last (ne .Role "assistant") }}@START@model
{{ end }}
{{- end }}"""
_OLLAMA_SYSTEM_TEXT = """\
{{ if $system }}{{ $system }}

{{ $system = "" }}{{ end }}"""
_OLLAMA_SYSTEM_TURN = """\
{{- if .System }}@START@system
{{ .System }}@END@
{{ end }}"""


def jinja(generation: int) -> str:
  """Returns the chat template of Hugging Face's tokenizers and of GGUF files.

  It takes `messages` of roles system, user and assistant (or model) with texts
  as contents, `bos_token` and `add_generation_prompt`, and calls
  `raise_exception` for what `chat` refuses. Its text is the BOS and every turn
  with the newline after it, as in `chat.render`; with `add_generation_prompt`
  it is that of `chat.render_prompt`.

  Args:
    generation: 1 to 4.
  """
  start, end = _tags(generation)
  system = (
      _JINJA_SYSTEM_TURN
      if chat.HAS_SYSTEM_ROLE[generation]
      else _JINJA_SYSTEM_TEXT
  )
  template = _JINJA.replace('@SYSTEM@', system)
  return template.replace('@START@', start).replace('@END@', end)


def ollama(generation: int) -> str:
  """Returns the Go template of a Modelfile; it has no BOS, llama.cpp adds it.

  It equals `chat.render_prompt` for texts without white space at their ends.

  Args:
    generation: 1 to 4.
  """
  start, end = _tags(generation)
  if chat.HAS_SYSTEM_ROLE[generation]:
    first, _, rest = _OLLAMA.partition('\n')
    del first  # $system is for the generations without a system turn.
    template = _OLLAMA_SYSTEM_TURN + '\n' + rest.replace('@SYSTEM@', '')
  else:
    template = _OLLAMA.replace('@SYSTEM@', _OLLAMA_SYSTEM_TEXT)
  return template.replace('@START@', start).replace('@END@', end)


def _tags(generation: int) -> tuple[str, str]:
  if generation not in chat.TURN_TAGS:
    raise errors.UserError(
        f'generation {generation}',
        f'one of {", ".join(map(str, chat.TURN_TAGS))}',
        'set --config.model.generation')
  return chat.TURN_TAGS[generation]
