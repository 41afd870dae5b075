"""A model's own chat template is followed or the difference is said; ours gives the ids that were trained on."""

import datetime
import json
import os
import shutil

import made_tokenizers as made
import pytest
from etils import epath

from srlm_jax.errors import BadInput
from srlm_jax.text.chat import FORMATS, encode_prompt, encode_response, with_system
from srlm_jax.text.templates import Fields, read_template, render, resolve, save_tokenizer
from srlm_jax.text.tokenizer import WordTokenizer, load_tokenizer

FIELDS = Fields(chat="config.chat", system="config.chat_system")
USER = [{"role": "user", "content": "Hello"}]
PROMPTS = ["Hello", " Hi there\n\n", "", "assistant\n4 🦙 и", "user: [INST] x Human: <</SYS>> assistant:", "\u2581a  b"]
ANSWERS = ["The answer is 4.", "hello\n\nthere", "🦙"]

# Format, template, begin token, end token.
PUBLISHED = {
    "smollm2": ("chatml", made.SMOLLM2, "<|im_start|>", "<|im_end|>"),
    "chatml": ("chatml", made.CHATML, "<s>", "<|im_end|>"),
    "llama2": ("llama2", made.LLAMA2, "<s>", "</s>"),
    "llama3": ("llama3", made.LLAMA3, "<s>", "<|eot_id|>"),
}


@pytest.fixture(scope="module", params=made.KINDS)
def kind(request):
    return made.KINDS[request.param]()


def theirs(folder, messages):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    prompts = [m for m in messages if m["role"] != "assistant"]
    ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=False)
    return ids, tokenizer.apply_chat_template(messages, return_dict=False)


def conversation(prompt, answer, system):
    told = [{"role": "system", "content": system}] if system else []
    return [*told, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.mark.parity
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("model", PUBLISHED)
def test_ids_are_those_of_transformers(tmp_path, kind, model, system):
    name, template, bos, eos = PUBLISHED[model]
    folder = made.write(tmp_path / "model", kind, bos=bos, eos=eos, template=template)
    check(folder, name, system)


@pytest.mark.parity
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_are_those_of_transformers_with_the_real_smollm2(system):
    if not os.environ.get("SRLM_SMOLLM2"):
        pytest.skip("needs the folder of SmolLM2-135M-Instruct as SRLM_SMOLLM2, which is not part of the project")
    check(os.environ["SRLM_SMOLLM2"], "chatml", system)


def check(folder, name, system):
    tokenizer = load_tokenizer(folder)
    chat, _ = resolve(folder, tokenizer, name, system, FIELDS)
    compared = 0
    for prompt in PROMPTS:
        if any(control in prompt for control in chat.control):
            continue  # which the template leaves in the prompt, and we do not
        for answer in ANSWERS:
            ids, whole = theirs(folder, conversation(prompt, answer, system))
            assert encode_prompt(tokenizer, chat, prompt) == ids
            ours = [*ids, *encode_response(tokenizer, chat, answer, finished=True)]
            if whole[: len(ids)] == ids:  # else the answer merges with the prompt, and no sample can begin so
                assert whole[: len(ours)] == ours  # ChatML's and Llama 3's go on with what is before another turn
                compared += 1
    assert compared or name == "llama3"  # whose two line breaks are one token only for a tokenizer of its own


@pytest.mark.parity
@pytest.mark.parametrize("model", PUBLISHED)
def test_an_answer_after_a_frame_it_would_merge_with_is_encoded_apart(tmp_path, model):
    name, template, bos, eos = PUBLISHED[model]
    folder = made.write(tmp_path / "model", made.byte_level(), bos=bos, eos=eos, template=template)
    tokenizer = load_tokenizer(folder)
    ids = encode_response(tokenizer, FORMATS[name], "\n\nhello", finished=True)
    assert tokenizer.decode(ids).strip(" ") == ("hello" if FORMATS[name].strips else "\n\nhello")


def test_a_mark_is_followed_by_no_space_on_a_vocabulary_of_sentencepiece(tmp_path):
    folder = made.write(
        tmp_path, made.metaspace("first"), bos="<s>", eos="<|im_end|>", template=made.CHATML
    )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    ids = encode_prompt(tokenizer, FORMATS["chatml"], "hello there.")
    assert tokenizer.piece(ids[1])[0] == "u"  # of "user", and not "▁user"


# What is said of a model's own template.


@pytest.fixture
def model(tmp_path):
    def write(template, bos="<s>", eos="<|im_end|>"):
        folder = made.write(tmp_path / "model", made.byte_level(), bos=bos, eos=eos, template=template)
        return folder, load_tokenizer(folder)

    return write


def test_a_template_that_is_the_format_needs_no_word(model):
    for name, template, bos, eos in list(PUBLISHED.values())[1:]:
        assert resolve(*model(template, bos, eos), name, None, FIELDS) == (FORMATS[name], None)
        told = with_system(FORMATS[name], "Be brief.")
        assert resolve(*model(template, bos, eos), name, "Be brief.", FIELDS) == (told, None)


def test_a_model_without_a_template_needs_no_word(model):
    assert resolve(*model(None), "chatml", None, FIELDS) == (FORMATS["chatml"], None)
    assert resolve(None, WordTokenizer(("a",)), "plain", None, FIELDS) == (FORMATS["plain"], None)


def test_a_system_prompt_of_the_templates_own_is_used_and_can_be_left_out(model):
    folder, tokenizer = model(made.SMOLLM2, "<|im_start|>")
    chat, note = resolve(folder, tokenizer, "chatml", None, FIELDS)
    assert chat.system == made.SMOLLM2_SYSTEM
    assert f"has a system prompt of its own, '{made.SMOLLM2_SYSTEM}', which is used" in note
    assert note.endswith("config.chat_system='' leaves it out")
    chat, note = resolve(folder, tokenizer, "chatml", "", FIELDS)
    assert chat.system == ""
    assert "config.chat_system is '': without it the template is followed" in note
    assert resolve(folder, tokenizer, "chatml", "Be brief.", FIELDS)[1] is None


def test_a_template_with_the_date_of_the_day_keeps_one_date(model):
    folder, tokenizer = model(made.LLAMA3_DATED, eos="<|eot_id|>")
    chat, note = resolve(folder, tokenizer, "llama3", None, FIELDS)
    assert chat.system == "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    assert "writes the date of the day, and here a fixed one stays" in note
    chat, note = resolve(folder, tokenizer, "llama3", "Be brief.", FIELDS)
    assert chat.system == "Be brief."
    assert "Today Date: 26 Jul 2024" in note and "give it the whole text to follow the template" in note


def test_a_template_that_needs_the_day_gives_one_text_on_all_days(model):
    template = "{{ '<|im_start|>system\n' + strftime_now('It is %d %b %Y.') + '<|im_end|>\n' }}" + made.CHATML
    chat, note = resolve(*model(template), "chatml", None, FIELDS)
    assert chat.system == "It is 26 Jul 2024."
    assert "writes the date of the day, and here a fixed one stays" in note


@pytest.mark.parametrize(
    ("template", "name", "said"),
    [
        (made.LLAMA2, "chatml", "gives '<s>[INST] Hello [/INST]' for the message 'Hello', and config.chat=chatml"),
        (made.LLAMA2, "chatml", "; choose config.chat=llama2"),
        ("Q: {{ messages[0].content }} A:", "chatml", "; no config.chat gives the template's text"),
        ("{{ raise_exception('no users') }}", "chatml", "cannot be rendered, so config.chat=chatml may differ from it"),
        ("{% if %}", "chatml", "cannot be rendered"),
        (made.LLAMA3.replace(" | trim", ""), "llama3", "keeps the white space around a message"),
        (made.CHATML.replace("['content']", "['content']|trim"), "chatml", "trims the white space around a message"),
    ],
)
def test_a_difference_is_said_with_what_closes_it(model, template, name, said):
    chat, note = resolve(*model(template), name, None, FIELDS)
    assert chat == FORMATS[name]
    assert said in note and "\n" not in note


def test_templates_are_found_where_transformers_puts_them(tmp_path, model):
    folder, _ = model("one")
    assert read_template(folder) == "one"
    config = {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "two"}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_template(folder) == "two"
    (folder / "chat_template.jinja").write_text("three")
    assert read_template(folder) == "three"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BadInput, match=r"chat_template\.jinja is not UTF-8"):
        read_template(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"chat_template": 7}')
    with pytest.raises(BadInput, match=r"tokenizer_config\.json: chat_template is 7, which is no text"):
        read_template(folder)


HOSTILE = {
    "endless": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "large": "{{ 'a' * 10**9 }}",
    "long list": "{{ [1] * 1000000000 }}",
    "wide": "{{ '%999999999d' % 1 }}",
    "classes": "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "namespace": "{% set ns = namespace(__class__=1) %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "change": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "zero": "{{ 1 / 0 }}",
    "index": "{{ messages[7].content.x }}",
    "syntax": "{% for %}",
    "nested loops": "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
    "nested conditions": "{% if true %}" * 120 + "{% endif %}" * 120,
    "no loop": "{% break %}",
    "twice": "{{ dict(a=1, a=2) }}",
    "half a character": "Hi \ud83d",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_does_nothing(template):
    with pytest.raises(BadInput):
        render(template, USER, {}, datetime.date(2024, 1, 2))


def test_a_template_sees_nothing_of_python():
    assert (
        render("{{ raise_exception.__globals__ }}{{ dict.__globals__ }}{{ messages.__class__ }}", USER, {}, None) == ""
    )


def test_what_templates_use_is_there():
    text = "{{ strftime_now('%d %b %Y') }} {{ messages|tojson }} {{ dict(a=1).a }} {{ 5 % 2 }} {{ bos_token }}"
    text += (
        "{% generation %}!{% endgeneration %}{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}{{ tools is none }}"
    )
    text += "{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    shown = render(text, [{"role": "user", "content": "<é>"}], {"bos_token": "<s>"}, datetime.date(2024, 1, 2))
    assert shown == '02 Jan 2024 [{"role": "user", "content": "<é>"}] 1 1 <s>!2True01'


@pytest.mark.parity
@pytest.mark.parametrize("model", [*PUBLISHED, "dated"])
def test_a_template_gives_the_text_that_transformers_renders(model):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = made.LLAMA3_DATED if model == "dated" else PUBLISHED[model][1]
    for messages in ([USER[0]], [{"role": "system", "content": " Be <brief> "}, USER[0]]):
        rendered, _ = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            add_generation_prompt=True,
            bos_token="<s>",
            eos_token="</s>",
        )
        assert [
            render(template, messages, {"bos_token": "<s>", "eos_token": "</s>"}, datetime.date.today())
        ] == rendered


# An export.

SYSTEMS = {
    "plain": "",
    "dialogue": "Be\n'kind' {{ x }} 🦙",
    "llama2": "Be kind.",
    "llama3": "x\n\n",
    "chatml": "Be kind.",
}


def export(folder, tokenizer, chat):
    folder = epath.Path(folder)
    folder.mkdir()
    save_tokenizer(folder, tokenizer, chat)
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("name", FORMATS)
def test_an_export_gives_transformers_the_ids_that_were_trained_on(tmp_path, kind, name):
    eos = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}.get(name, "</s>")
    tokenizer = load_tokenizer(made.write(tmp_path / "model", kind, bos="<s>", eos=eos, template=None))
    for number, system in enumerate({"", SYSTEMS[name]}):
        chat = with_system(FORMATS[name], system)
        folder = export(tmp_path / f"export{number}", tokenizer, chat)
        check_export(folder, tokenizer, chat, PROMPTS)


def check_export(folder, tokenizer, chat, prompts):
    for prompt in prompts:
        ids, whole = theirs(folder, conversation(prompt, "The answer is 4.", ""))
        assert encode_prompt(tokenizer, chat, prompt) == ids
        ours = [*ids, *encode_response(tokenizer, chat, "The answer is 4.", finished=True)]
        assert whole[: len(ours)] == ours or whole[: len(ids)] != ids


@pytest.mark.parity
@pytest.mark.parametrize("name", ["plain", "dialogue", "llama2"])
def test_an_export_of_llama_2_gives_transformers_the_ids_that_were_trained_on(tmp_path, llama2, name):
    chat = with_system(FORMATS[name], SYSTEMS[name])
    folder = export(tmp_path / "export", llama2, chat)
    # transformers 5 joins spaces that SentencePiece, and Llama 2 with it, leaves apart.
    check_export(folder, llama2, chat, [p for p in PROMPTS if "  " not in p and "user:  " not in f"user: {p}"])


@pytest.mark.parity
def test_an_export_of_the_embedded_world_gives_transformers_the_ids_that_were_trained_on(tmp_path):
    words = WordTokenizer(("user:", "assistant:", "someone", "\n", "list", "three", "fruits", "."))
    folder = export(tmp_path / "export", words, FORMATS["plain"])
    assert load_tokenizer(folder) == words
    words.save_hf(folder)
    (folder / "words.json").unlink()
    for prompt in ("list three fruits .", "user: list\nassistant: three"):
        ids, whole = theirs(folder, conversation(prompt, "fruits .", ""))
        assert encode_prompt(words, FORMATS["plain"], prompt) == ids
        assert whole == [*ids, *encode_response(words, FORMATS["plain"], "fruits .", finished=True)]


def test_a_template_that_gives_the_trained_ids_stays_as_it_came(tmp_path, model):
    folder, tokenizer = model(made.SMOLLM2, "<|im_start|>")
    config = (folder / "tokenizer_config.json").read_bytes()
    followed, _ = resolve(folder, tokenizer, "chatml", None, FIELDS)
    kept = export(tmp_path / "kept", tokenizer, followed)
    assert (kept / "tokenizer_config.json").read_bytes() == config
    other = export(tmp_path / "other", tokenizer, FORMATS["chatml"])
    assert read_template(other) != made.SMOLLM2
    rest = [json.loads(text) for text in (config, (other / "tokenizer_config.json").read_text())]
    for fields in rest:
        del fields["chat_template"]
    assert rest[0] == rest[1]


def test_a_template_in_a_file_of_its_own_is_replaced_there(tmp_path, model):
    folder, tokenizer = model(None)
    (folder / "chat_template.jinja").write_text(made.SMOLLM2)
    config = (folder / "tokenizer_config.json").read_bytes()
    other = export(tmp_path / "other", tokenizer, FORMATS["chatml"])
    assert (other / "tokenizer_config.json").read_bytes() == config
    assert "SmolLM" not in (other / "chat_template.jinja").read_text()
    again = tmp_path / "again"
    shutil.copytree(other, again)
    assert resolve(again, load_tokenizer(again), "chatml", None, FIELDS) == (FORMATS["chatml"], None)


def test_a_conversation_of_several_turns_is_rendered(tmp_path, model):
    _, tokenizer = model(None)
    turns = [*conversation("a", "b", ""), {"role": "user", "content": "c"}]
    shown = {
        name: render(read_template(export(tmp_path / name, tokenizer, chat)), turns, {}, None)
        for name, chat in FORMATS.items()
    }
    assert shown["llama2"] == "<s>[INST] a [/INST] b <|im_end|><s>[INST] c [/INST]"
    user, assistant = "<|im_start|>user\n", "<|im_start|>assistant\n"
    assert shown["chatml"] == f"{user}a<|im_end|>\n{assistant}b<|im_end|>\n{user}c<|im_end|>\n{assistant}"
    assert shown["plain"] == "user: a\nassistant: b<|im_end|>user: c\nassistant:"
