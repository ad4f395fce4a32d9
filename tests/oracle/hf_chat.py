#!/usr/bin/env python3
"""Compares `sala data render` with apply_chat_template of transformers.

    python tests/oracle/hf_chat.py --build build/release

Templates of the forms in use (trimmed blocks, macros, loop controls, tools, dates, earlier turns written anew, generation blocks) and the
program's own families are rendered by both sides over conversations with tools, thoughts, several scripts and odd white space. The text
must be the same byte for byte. Where a template has generation blocks the learned characters must be those of transformers, too. Prints
one line per template and one per violation; exits 1 when there is any.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from transformers.utils.chat_template_utils import render_jinja_template

VARIABLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}

QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nFunctions you may call:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.function.name }}{{- '", "arguments": ' }}
                {{- tool_call.function.arguments if tool_call.function.arguments is string else tool_call.function.arguments | tojson }}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Thoughts of turns before the last question go, as with models that reason.
REWRITING = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- macro say(role, text) %}
<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last %}
{{ say('assistant', '<think>\\n' + thought + '\\n</think>\\n\\n' + message.content) }}
        {%- else %}
{{ say('assistant', message.content) }}
        {%- endif %}
        {%- continue %}
    {%- endif %}
{{ say(message.role, message.content) }}
{%- endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

GENERATION = """{% for message in messages %}
    {% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content | trim }}<|im_end|>
{% endgeneration %}
    {% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
    {% endif %}
{% endfor %}
"""

FAMILIES = {"chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}",
            "plain": "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content | trim + '\\n' }}{% endfor %}"}

PLAIN_TALK = [
    [("user", "Hello"), ("assistant", "Hi.")],
    [("system", " Be brief.\n"), ("user", "Größe? 日本 😀"), ("assistant", "\n{{ braces }} {% raw %} <b>&amp;</b>\n"),
     ("user", "And\r\n\tso?"), ("assistant", "Bye.")],
    [("user", "a"), ("assistant", ""), ("user", ""), ("assistant", " ")],
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"where": "Köln", "at": [1, 2.5, None, True], "a": "<b>"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "It's \"weather\"", "parameters": {"z": 1, "a": {"type": "x"}}}}]
TOOL_TALK = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "?"},
                          {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"},
                          {"role": "tool", "content": "wind"}, {"role": "assistant", "content": "It rains."}], "tools": TOOLS}
THOUGHTS = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "x"},
                         {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "reasoning_content": "y"}]}

failures = []


def fail(text):
    failures.append(text)
    print(f"FAILED {text}")


def render(sala, folder, template, record, mask):
    """What the program says of a record, as the JSON of --json."""
    (folder / "record.jsonl").write_text(json.dumps(record) + "\n")
    command = [sala, "data", "render", folder / "record.jsonl", "--tokenizer", folder / "tokenizer", "--chat-template", template,
               "--chat-mask", mask, "--json"]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        fail(f"{template}: {done.stderr.strip()}")
        return None
    return json.loads(done.stdout)


def compare(sala, folder, name, template, source, record, mask):
    texts, spans = render_jinja_template([record["messages"]], tools=record.get("tools"), chat_template=source,
                                         return_assistant_tokens_mask="{% generation %}" in source, **VARIABLES)
    found = render(sala, folder, template, record, mask)
    if found is None:
        return
    if found["text"] != texts[0]:
        fail(f"{name}: {found['text']!r} is not {texts[0]!r}")
    if spans:
        wanted = [[len(texts[0][:place].encode()) for place in span] for span in spans[0]]
        if found["learned"] != wanted:
            fail(f"{name}: learned {found['learned']}, transformers says {wanted}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", default="build/release")
    sala = pathlib.Path(parser.parse_args().build).resolve() / "bin" / "sala"
    folder = pathlib.Path(tempfile.mkdtemp(prefix="sala-hf-chat-"))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "byte_tokenizer.json").write_text("{}")
    # eos is a token of the byte tokenizer, bos is written by its number.
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(VARIABLES))
    talks = [{"messages": [{"role": role, "content": content} for role, content in turns]} for turns in PLAIN_TALK]
    cases = [("qwen", QWEN, [*talks, TOOL_TALK], "assistant"), ("llama", LLAMA, talks, "assistant"),
             ("rewriting", REWRITING, [*talks, THOUGHTS], "last"), ("generation", GENERATION, talks, "assistant")]
    for name, source, records, mask in cases:
        (folder / f"{name}.jinja").write_text(source)
        for record in records:
            compare(sala, folder, name, folder / f"{name}.jinja", source, record, mask)
        print(f"{name}: {len(records)} conversations")
    for name, source in FAMILIES.items():
        for record in talks:
            compare(sala, folder, name, name, source, record, "assistant")
        print(f"{name}: {len(talks)} conversations")
    shutil.rmtree(folder)
    sys.exit(1 if failures else 0)


main()
