"""Renders chat templates with Jinja2, for the program that started it (data/jinja.h).

Reads requests from standard input and writes answers to standard output, each a JSON text behind its length in bytes as eight
little-endian bytes. The first request has the template, later ones a conversation and what to render of it:

    {"template": TEXT, "variables": {NAME: VALUE}}                      ->  {"generation": whether it has such blocks}
    {"messages": [...], "tools": [...] or null, "spans": BOOL,
     "renders": [[FIRST_N_MESSAGES, WITH_GENERATION_PROMPT], ...]}      ->  {"texts": [...], "spans": [[BEGIN, END], ...]}

A content that is a list of text parts reaches the template as one text where the template says such a text there, else as the list
where it says all its parts (contents_for). `spans` are the bytes of the generation blocks of the first render. An answer of
{"error": TEXT, "line": N} says what is wrong with the template or what it says of the conversation; {"missing": TEXT} that Jinja2 is
not there. The environment is that of the chat templates of Hugging Face tokenizers: sandboxed, with trimmed blocks, loop controls,
raise_exception, strftime_now and their tojson.
"""

import sys

sys.path = [place for place in sys.path if place]  # modules never come from the folder the user works in

import datetime
import json
import os
import re
import resource
import secrets
import select
import struct
import threading

MEMORY_GIB = 4  # a template that builds more than this is wrong


def read_request():
    head = sys.stdin.buffer.read(8)
    if len(head) < 8:
        sys.exit(0)
    return json.loads(sys.stdin.buffer.read(struct.unpack("<Q", head)[0]))


def end_with_parent():
    """Ends this process when the other end of the socket is closed, also in the middle of a render.

    The kernel's signal at a parent's death would not do: it comes when the thread that started this process ends.
    """
    poll = select.poll()
    poll.register(sys.stdin.buffer.fileno(), 0)  # hang-up only
    poll.poll()
    os._exit(0)


def answer(value):
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    sys.stdout.buffer.write(struct.pack("<Q", len(body)) + body)
    sys.stdout.buffer.flush()


def make_environment(marks):
    """`marks`: texts around what generation blocks say; no text of a conversation has them, since they are drawn anew."""

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller):
            text = caller()
            return marks["begin"] + text + marks["end"] if marks["on"] else text

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(format):
        return datetime.datetime.now().strftime(format)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def spans_of(marked, marks):
    """The text without its marks, and the bytes that stood between them."""
    spans, plain, begin = [], "", 0
    size = 0  # of `plain` in bytes
    for piece in re.split("(" + re.escape(marks["begin"]) + "|" + re.escape(marks["end"]) + ")", marked):
        if piece == marks["begin"]:
            begin = size
        elif piece == marks["end"]:
            spans.append([begin, size])
        else:
            plain += piece
            size += len(piece.encode("utf-8", "replace"))
    return plain, spans


def line_of(error):
    """The line of the template where an error came from, 0 if it is not known."""
    line, trace = getattr(error, "lineno", None) or 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def render_one(template, variables, messages, tools, prompt):
    # The names are those that every template may use; unset ones are None, as templates expect.
    return template.render(messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, **variables)


def has_parts(message):
    return isinstance(message.get("content"), list)


def joined(message):
    """The message with its parts as one text."""
    return {**message, "content": "".join(part["text"] for part in message["content"])} if has_parts(message) else message


def contents_for(render, messages):
    """The messages with each content that is a list in the form that the template reads in that place.

    Marks stand in for the texts, drawn anew, so that what becomes of each part is seen. A template may read texts of one role and
    lists of another, the first part only, or print a list as Python would.
    """
    key = secrets.token_hex(8)
    parts = [i for i, message in enumerate(messages) if has_parts(message)]

    def said(lists):
        """{message: how much of its content is said}, 0 to 1; -1 where the list itself is printed, keys and all."""
        marks, probes = {}, list(messages)
        for i in parts:
            count = len(messages[i]["content"]) if i in lists else 1
            marks[i] = [f"{key}-{i}-{part}-" for part in range(count)]
            content = [{"type": "text", "text": mark, f"{key}-{i}-key": ""} for mark in marks[i]] if i in lists else marks[i][0]
            probes[i] = {**messages[i], "content": content}
        try:
            text = render(probes)
        except Exception:  # whatever it says of such contents, it does not read them
            return dict.fromkeys(parts, 0)
        return {i: -1 if f"{key}-{i}-key" in text else sum(mark in text for mark in marks[i]) / max(len(marks[i]), 1) for i in parts}

    as_texts = said([])
    unread = [i for i in parts if as_texts[i] < 1]
    if not unread:
        return [joined(message) for message in messages]
    as_lists = said(parts)
    lists = [i for i in unread if as_lists[i] == 1]
    chosen = said(lists)
    for i in unread:
        if chosen[i] < 1 and as_lists[i] != 0:  # 0: the template says nothing of this message, whatever its form
            raise ValueError(f"message {i}: the template says the list of parts that its content is only in part; "
                             "give the content as one string")
    return [message if i in lists else joined(message) for i, message in enumerate(messages)]


def render_all(template, variables, marks, request):
    messages, tools = request["messages"], request["tools"]
    marks["on"] = False
    if any(has_parts(message) for message in messages):
        count, prompt = request["renders"][0]
        messages = contents_for(lambda probes: render_one(template, variables, probes[:count], tools, prompt), messages)

    def render(count, prompt):
        return render_one(template, variables, messages[:count], tools, prompt)

    texts = [render(count, prompt) for count, prompt in request["renders"]]
    spans = []
    if request["spans"]:
        marks["on"] = True
        plain, spans = spans_of(render(*request["renders"][0]), marks)
        if plain != texts[0]:
            raise ValueError("the template changes what its generation blocks say, so they cannot be found in the text")
    return {"texts": texts, "spans": spans}


def main():
    threading.Thread(target=end_with_parent, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_GIB << 30, MEMORY_GIB << 30))
    start = read_request()
    key = secrets.token_hex(16)
    marks = {"begin": f"\ue000{key}\ue001", "end": f"\ue002{key}\ue003", "on": False}
    try:
        template = make_environment(marks).from_string(start["template"])
    except Exception as error:
        answer({"error": str(error), "line": line_of(error)})
        return
    answer({"generation": re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", start["template"]) is not None})
    while True:
        request = read_request()
        try:
            answer(render_all(template, start["variables"], marks, request))
        except MemoryError as error:
            answer({"error": f"the record takes more than the {MEMORY_GIB} GiB of memory that one may", "line": line_of(error)})
        except Exception as error:
            answer({"error": str(error) or type(error).__name__, "line": line_of(error)})


try:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
except ImportError as error:
    answer({"missing": str(error)})
    os._exit(1)
main()
