"""Chat templates for other runtimes, made from the tables of `chat`.

They render the text that `chat.render` and `chat.render_prompt` tokenise: a
served model gets prompts in the form that it was tuned on.
"""

from gemma_sft import chat
from gemma_sft import errors

# `{%-` removes the white space before it, so the result does not depend on
# Jinja's trim_blocks. llama.cpp's own Jinja has to know all filters and tests;
# there, {{ bos_token }} is empty, because the server adds BOS itself.
# `chat.render_prompt` refuses a prompt that follows a turn of the model, but
# this template renders it: llama.cpp tries it out at start, and refuses a
# template that raises.
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

# Go's text/template can neither strip a text nor raise an error. So in Ollama,
# contents keep the white space at their ends, an empty text becomes an empty
# turn, and messages of other roles (tool) are left out. Before the template
# runs, Ollama joins system texts into .System, and adjacent messages of one
# role into one message, with a blank line between. A last turn of the assistant
# stays open, so that clients can have the answer continued.
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
  `raise_exception` for what `chat` refuses. It renders BOS and every turn with
  the newline after it, as `chat.render` does, or with `add_generation_prompt`
  what `chat.render_prompt` does.
  """
  start, end = _tags(generation)
  system = (_JINJA_SYSTEM_TURN if chat.HAS_SYSTEM_ROLE[generation]
            else _JINJA_SYSTEM_TEXT)
  template = _JINJA.replace('@SYSTEM@', system)
  return template.replace('@START@', start).replace('@END@', end)


def ollama(generation: int) -> str:
  """Returns the Go template of a Modelfile, without BOS: llama.cpp adds it.

  It renders what `chat.render_prompt` does, for texts without white space at
  their ends.
  """
  start, end = _tags(generation)
  if chat.HAS_SYSTEM_ROLE[generation]:
    # The first line sets $system, which only the other generations need.
    rest = _OLLAMA.partition('\n')[2]
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
