"""Chat templates: the same text as `transformers` writes, nothing smuggled in, and no template takes the machine."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tutorial_lib.data.adapters import HuggingFaceTokenizer, as_huggingface
from tutorial_lib.data.bpe import BPETokenizer
from tutorial_lib.data.corpora import fetch
from tutorial_lib.data.protocol import token_bytes
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.gguf_file import GGUFFile
from tutorial_lib.serve import jinja_sandbox
from tutorial_lib.serve.template import PLAIN, ChatTemplate, TemplateProblem

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|begin|>system
You help.<|end|>
' }}{% endif %}{{ '<|begin|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|begin|>assistant\n' }}{% endif %}"""

LIKE_LLAMA_3 = """{{- bos_token }}
{%- if custom_tools is defined %}{% set tools = custom_tools %}{% endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set told = "" %}
{%- endif %}
{{- "<|begin|>system\\n\\n" }}
{%- if tools is not none %}{{- "Tools: " }}{% endif %}
{{- "Today Date: " + strftime_now("%Y") + "\\n\\n" }}
{{- told }}
{{- "<|end|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|begin|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {{- message.tool_calls | tojson(indent=4) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|begin|>assistant\\n\\n' }}
{%- endif %}
"""

LIKE_MISTRAL = """{%- if messages[0]["role"] == "system" -%}
    {%- set told = messages[0]["content"] %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif -%}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and told is defined %}
            {{- '[INST] ' + told + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""

LIKE_QWEN_3 = """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro turn(role, text) %}{{ '<|begin|>' ~ role ~ '\\n' ~ text ~ '<|end|>\\n' }}{% endmacro %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content, thought = message.content, '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- turn('assistant', '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content) }}
        {%- else %}{{- turn(message.role, content) }}{% endif %}
    {%- elif message.role in ["user", "system"] %}
        {{- turn(message.role, message.content | replace('\\r\\n', '\\n')) }}
    {%- else %}{% continue %}
    {%- endif %}
{%- endfor %}
{{- {'roles': messages | map(attribute='role') | unique | list, 'n': messages | selectattr('role', 'equalto', 'user')
    | list | length} | tojson }}
{%- if add_generation_prompt %}
    {{- '<|begin|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

LIKE_SMOLLM_3 = """{% for message in messages %}{% if message.role == 'assistant' -%}
    {% generation %}{{ '<|begin|>' + message.content + '<|end|>' }}{% endgeneration %}
{%- else %}{{ message.role + ': ' + message.content }}{% endif %}
{% endfor %}
"""

TEMPLATES = {
    "plain": PLAIN,
    "chatml": CHATML,
    "llama 3": LIKE_LLAMA_3,
    "mistral": LIKE_MISTRAL,
    "qwen 3": LIKE_QWEN_3,
    "smollm 3": LIKE_SMOLLM_3,
}
each_template = pytest.mark.parametrize("name", TEMPLATES)
SPECIALS = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
NAMES = ["<|begin|>", "<|end|>", "[INST]", "[/INST]"]
BYTES = ByteTokenizer(NAMES)
PAIRS = BPETokenizer({**{bytes([b]): b for b in range(256)}, b"<|": 256, b"|>": 257, b"en": 258}, NAMES)
USER = [{"role": "user", "content": "Hello."}]


def theirs(source: str):
    transformers = pytest.importorskip("transformers")
    inner = as_huggingface(PAIRS).tokenizer
    inner.encode_special_tokens = False
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=source, clean_up_tokenization_spaces=False, **SPECIALS
    )


@pytest.fixture(scope="module")
def references():
    return {name: theirs(source) for name, source in TEMPLATES.items()}


contents = st.text(st.sampled_from("ab \n\r<>|[]/{}%'\"\\é😀") | st.characters(codec="utf-8"), max_size=12)
contents |= st.sampled_from(["<think>\nhm\n</think>\n\nso", " {{ 7 * 7 }} ", "{% raw %}", "a</think>b"])


@st.composite
def chats(draw, texts=contents):
    turns = draw(st.integers(0, 3))
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * turns + ["user"]
    return [{"role": role, "content": draw(texts)} for role in roles]


# ── As `transformers` ────────────────────────────────────────────────────────────────────────────────────


@each_template
@settings(max_examples=15)
@given(messages=chats(), answer_next=st.booleans())
def test_the_same_text_and_the_same_ids(references, name, messages, answer_next):
    template, them = ChatTemplate(TEMPLATES[name], SPECIALS), references[name]
    text = them.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
    assert template.write(messages, answer_next) == text
    if not any(special in m["content"] for special in NAMES for m in messages):
        ids = them.apply_chat_template(messages, tokenize=True, add_generation_prompt=answer_next)
        assert template.encode(PAIRS, messages, answer_next) == getattr(ids, "input_ids", ids)


def test_what_a_template_refuses_is_told_in_its_words():
    template = ChatTemplate(LIKE_MISTRAL, SPECIALS)
    with pytest.raises(TemplateProblem, match="^After the optional system message, .* must alternate$"):
        template.write(USER + USER)
    with pytest.raises(TemplateProblem, match="^two lines$"):
        ChatTemplate("{{ raise_exception('two\nlines') }}").write(USER)


@pytest.mark.slow
def test_the_template_of_smollm2():
    source = GGUFFile(fetch("smollm2")).metadata["tokenizer.chat_template"]
    for messages in ([{"role": "system", "content": "Be brief."}, *USER], USER):
        text = theirs(source).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ChatTemplate(source).write(messages) == text
        assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")


def test_without_a_template_it_is_a_plain_script():
    messages = [*USER, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Bye."}]
    text = "User: Hello.\n\nAssistant: Hi.\n\nUser: Bye.\n\n"
    assert ChatTemplate(PLAIN).write(messages, False) == text
    assert ChatTemplate(PLAIN).write(messages) == text + "Assistant:"
    assert ChatTemplate(PLAIN).encode(ByteTokenizer(), USER) == list(b"User: Hello.\n\nAssistant:")


@pytest.mark.parametrize(
    "message",
    [{"role": "root", "content": ""}, {"role": "user"}, {"content": "x"}, {"role": "user", "content": ["x"]}],
)
def test_what_is_no_message_is_refused(message):
    for call in (ChatTemplate(PLAIN).write, lambda m: ChatTemplate(PLAIN).encode(BYTES, m)):
        with pytest.raises(TemplateProblem, match=r"a message has a role \(system, user, assistant\)"):
            call([message])


# ── Specials ─────────────────────────────────────────────────────────────────────────────────────────────

fragments = st.lists(
    st.sampled_from([*NAMES, "<|", "|>", "<", "[", "]", "end", "\ufdd0", "INST", " ", "é"]), max_size=8
)


@each_template
@settings(max_examples=15)
@given(messages=chats(fragments.map("".join)), tokenizer=st.sampled_from([BYTES, PAIRS]))
def test_names_of_specials_in_a_message_stay_text(name, messages, tokenizer):
    template = ChatTemplate(TEMPLATES[name], SPECIALS)
    ids = template.encode(tokenizer, messages)
    harmless = [{**m, "content": "x"} for m in messages]
    specials = set(tokenizer.specials.values())
    by_template = [i for i in template.encode(tokenizer, harmless) if i in specials]
    assert [i for i in ids if i in specials] == by_template
    shown = b"".join(token_bytes(tokenizer, i) for i in ids).decode()
    plain = [{**m, "content": m["content"].replace("\ufdd0", "")} for m in messages]
    assert shown == template.write(plain)


def test_names_that_overlap_are_not_smuggled_in():
    tokenizer = ByteTokenizer(["aba", "<a", "<a>"])
    template = ChatTemplate("<a>{{ messages[0].content }}<a")
    for text in ("ababa", "abababa", "<a>", "<a<a>>", "<<a", "aba<aba"):
        ids = template.encode(tokenizer, [{"role": "user", "content": text}])
        assert ids == [258, *text.encode(), 257]


@pytest.mark.parametrize("first_only", [True, False])
def test_a_tokenizer_that_puts_a_blank_before_a_text(first_only):
    # Before the first piece alone, or after every special, too: what it does with the whole text counts.
    tokenizers = pytest.importorskip("tokenizers")
    letters = ["<unk>", "<|begin|>", "<|end|>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcd"]
    vocab = {token: i for i, token in enumerate(letters)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    if first_only:
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        inner.normalizer = tokenizers.normalizers.Prepend("▁")
    inner.decoder = tokenizers.decoders.ByteFallback()
    inner.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer = HuggingFaceTokenizer(inner)
    template = ChatTemplate("<|begin|>{{ messages[0].content }}<|end|>ab")
    ids = template.encode(tokenizer, [{"role": "user", "content": "cd"}])
    inner.encode_special_tokens = False
    assert ids == inner.encode("<|begin|>cd<|end|>ab", add_special_tokens=False).ids
    assert ids.count(vocab["▁"]) == (0 if first_only else 2)


# ── Templates that mean no good ──────────────────────────────────────────────────────────────────────────

SECRETS = [
    "{{ messages.__class__ }}",
    "{{ messages[0].content['__class__'].__mro__ }}",
    "{{ messages | map(attribute='__class__') | first }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__.__builtins__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(a=1).__class__ }}",
    "{{ range.__self__ }}",
    "{{ self.__init__ }}{{ self._TemplateReference__context }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ loop }}{{ environment }}{{ config }}{{ __import__ }}{{ open }}",
    "{% for x in messages %}{{ loop.__init__ }}{{ loop._iterable }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._func }}",
]
REFUSED = [
    "{{ __import__('os').system('true') }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ messages | attr('__class__') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ (1).to_bytes(99, 'big') }}",
    "{{ messages",
    "{% for %}",
    "{{ x | no_such_filter }}",
    "{{ 1 / 0 }}",
    "{{ none.x.y }}",
    "{% for a in 5 %}{% endfor %}",
    "{{ '9' * 9 }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ strftime_now('%d' * 9) }}",
    "(" * 9 + "{{" + "(" * 5000 + ")" * 5000 + "}}",
    "{{ " + "-" * 5000 + "1 }}",
    "{% if 1 %}" * 200 + "{% endif %}" * 200,
    "{% for x in messages %}" * 30 + "{% endfor %}" * 30,
    "x" * 100_000,
]
GROWS = "{% set ns = namespace(a='ab', l=['ab']) %}{% for i in range(99) %}{% set "
HUGE = (
    "{% set ns = namespace(a='abcdefghij') %}{% for i in range(16) %}{% set ns.a = ns.a + ns.a %}{% endfor %}"
)
LISTS = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(N) %}{% set ns.a = [ns.a, ns.a] %}"
LISTS += "{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
GREEDY = [
    "{{ 'a' * 10**9 }}",
    "{{ 'a' * 1000000000 }}",
    "{{ [1] * 1000000000 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 2 ** 1000000 }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "{% for i in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3,
    "{% set x %}" + "{% for i in range(99999) %}" * 3 + "xxxxxxxxxx" + "{% endfor %}" * 3 + "{% endset %}",
    "{% for i in range(99999) if i < 0 %}{% endfor %}" * 60,
    "{{ range(99999) | list | tojson }}" * 9,
    "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{% if n %}{{ caller() }}{% call f(n - 1) %}{{ caller() }}{{ caller() }}{% endcall %}"
    "{% endif %}{% endmacro %}{% call f(60) %}x{% endcall %}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000d}'.format(1) }}",
    "{{ '{:1000000000d}'.format_map({}) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}{{ 'a'.rjust(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a\nb' | indent(1000000000) }}",
    "{{ 'a' | indent(1000000000, true) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}",
    "{{ lipsum(n=1000000000) }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    GROWS + "ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    GROWS + "ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    GROWS + "ns.a = [ns.a, ns.a] | join %}{% endfor %}{{ ns.a }}",
    GROWS + "ns.a = ns.a.join([ns.a, ns.a]) %}{% endfor %}{{ ns.a }}",
    GROWS + "ns.a = ns.a.join(ns.a) %}{% endfor %}{{ ns.a }}",
    GROWS + "ns.a = ns.a.replace('a', ns.a) %}{% endfor %}{{ ns.a }}",
    GROWS + "ns.a = ns.a | replace('', ns.a) %}{% endfor %}{{ ns.a }}",
    GROWS + "ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}",
    GROWS + "ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    GROWS + "ns.l = (ns.l, ns.l) %}{% endfor %}{{ ns.l | string }}",
    GROWS + "ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l | tojson }}",
    GROWS + "ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l ~ '' }}",
    "{% set a = 'ab' %}" + "{% set a %}{{ a }}{{ a }}{{ a }}{% endset %}" * 40 + "{{ a }}",
    "{% set a = 'ab' %}" + "{% set a %}{% filter upper %}{{ a }}{{ a }}{% endfilter %}{% endset %}" * 40,
    HUGE + "{{ [" + "ns.a," * 800 + "] | join }}",
    HUGE + "{{ " + "ns.a ~" * 200 + "'' }}",
    HUGE + "{% set x %}" + "{{ ns.a }}" * 500 + "{% endset %}",
    HUGE + "{{ range(9999) | map('default', true) | map(attribute='q', default=ns.a) | join }}",
    HUGE + "{{ range(9999) | map(attribute='q', default=ns.a) | list }}",
    HUGE + "{{ range(9999) | map('replace', '1', ns.a) | list }}",
    HUGE + "{{ ns.a.strip(ns.a + 'x') }}{{ ns.a | trim(ns.a) }}",
    HUGE + "{% for i in range(99999) %}{% set x = ns.a.upper() %}{% endfor %}",
    HUGE + "{% set x %}{% for i in range(99999) %}{{ ns.a[i:] }}{% endfor %}{% endset %}",
    HUGE
    + "{{ ns.a | list | map('upper') | map('lower') | join | list | sort | unique | list | length }}" * 9,
    "{% set l = range(99999) | list %}{{ range(99999) | select('in', l) | first }}"
    "{{ range(99999) | reject('in', l) | list }}",
    LISTS.replace("N", "14") + "{% for i in range(99999) %}{% if ns.a == ns.b %}{% endif %}{% endfor %}",
    LISTS.replace("N", "14") + "{% for i in range(99999) %}{% if ns.a is eq(ns.b) %}{% endif %}{% endfor %}",
    LISTS.replace("N", "99") + "{{ ns.a == ns.b }}",
    "{% set n = namespace(a=namespace(a=1, b=1)) %}"
    "{% for i in range(60) %}{% set n.a = namespace(a=n.a, b=n.a) %}{% endfor %}{{ n.a }}"
    "{{ raise_exception('as it should be') }}",
    "{{ '1' * 9 | int }}" + HUGE + "{{ ('1' ~ ns.a[:0]) | int ** 99999999 }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    HUGE + "{% set x = ns.a.replace('abcdefghij', '1111111111') | int(base=32) %}{{ x // 3 }}{{ x / x }}",
]


@pytest.mark.parametrize("source", SECRETS)
def test_nothing_else_can_be_reached(source):
    try:
        text = ChatTemplate(source).write(USER)
    except TemplateProblem:
        return
    assert text == "" or "Undefined" in text


def complaint(source: str) -> str:
    with pytest.raises(TemplateProblem) as problem:
        ChatTemplate(source).write(USER)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 300
    return str(problem.value)


@pytest.mark.parametrize("source", REFUSED, ids=lambda s: s[:40])
def test_what_fails_is_told_in_one_sentence(source):
    assert complaint(source)


@pytest.mark.parametrize("source", GREEDY, ids=lambda s: s.removeprefix(HUGE)[:60])
def test_a_template_cannot_take_the_machine(source, monkeypatch):
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 0.1)  # of a processor's time, so that these tests are quick
    tracemalloc.start()
    try:
        assert complaint(source)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_long_conversation_is_no_attack():
    messages = (USER + [{"role": "assistant", "content": "word " * 40}]) * 1000 + USER
    for source in TEMPLATES.values():
        assert len(ChatTemplate(source, SPECIALS).write(messages)) > 200_000
