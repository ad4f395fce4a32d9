#!/usr/bin/env python3
"""What Jinja2 makes of the published template of each chat family, for tests/data/chat_test.cc.

    python3 tests/data/chat_goldens.py          # compares with chat_goldens.json
    python3 tests/data/chat_goldens.py --make   # writes it again

Needs the Debian package python3-jinja2. Written from the published templates of the families without their parts for tools; `plain`
is a family of our own, and its template here says what docs/formats.md says of it.
"""

import argparse
import json
import pathlib
import sys

import jinja2.sandbox

TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "qwen2": "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
             "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
             "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
              "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "plain": "{% for message in messages %}{{ message.role | capitalize + ': ' + message.content | trim + '\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
}

CONVERSATIONS = [
    [("user", "Hello"), ("assistant", "Hi.")],
    [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "And?"), ("assistant", "Bye.")],
    [("user", "  white space \n"), ("assistant", "\n\tboth ends, inside\n\nkept  ")],
    [("user", "Größe? 日本 😀"), ("assistant", "{{ braces }} {% raw %} <b>&amp;</b> \"quoted\"")],
    [("user", ""), ("assistant", "")],
]


def make():
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    cases = []
    for family, text in TEMPLATES.items():
        template = environment.from_string(text)
        for turns in CONVERSATIONS:
            messages = [{"role": role, "content": content} for role, content in turns]
            texts = [template.render(messages=part, add_generation_prompt=prompt, bos_token="<|begin_of_text|>")
                     for part, prompt in ((messages, False), (messages[:-1], True))]
            cases.append({"family": family, "messages": messages, "text": texts[0], "prompt": texts[1]})
    return json.dumps(cases, indent=1, ensure_ascii=False) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--make", action="store_true")
    path = pathlib.Path(__file__).with_name("chat_goldens.json")
    text = make()
    if parser.parse_args().make:
        path.write_text(text, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != text:
        sys.exit(f"{path}: not what Jinja2 makes of the templates")


main()
