"""Chat templates: every one that TRL ships trains to the whole text's own tokens, or is refused.

`python tests/test_templates.py` writes tests/templates.md.
"""

import glob
import importlib.util
import os
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from onn_core import data
from onn_core.data import chat
from onn_core.errors import DataError, OnnError

TRL = importlib.util.find_spec("trl")
FOLDER = Path(TRL.origin).parent / "chat_templates" if TRL else Path("absent")
TEMPLATES = {Path(path).stem: path for path in sorted(glob.glob(f"{FOLDER}/*.jinja"))}
# What some templates mark beside the answer: its header, an opened or empty thought, whitespace.
HEADS = re.compile(r"<\|start\|>assistant|<｜Assistant｜>|</?think>|\s")
MARKS = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")

USER, ANSWER = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Lisbon."}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
TOOL = {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}
ROWS = {
    "one turn": {"messages": [USER, ANSWER]},
    "two turns": {
        "messages": [USER, ANSWER, USER, {"role": "assistant", "content": "In Madrid, I think."}]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "get_weather", "content": "-3 degrees"},
            {"role": "assistant", "content": "Cold."},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "reasoning": {"messages": [USER, ANSWER | {"reasoning_content": "A port."}]},
}


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir):
    return AutoTokenizer.from_pretrained(smollm2_dir)


def learned_texts(row, tokenizer):
    rendered = chat.render(row, tokenizer)
    return [rendered.text[start:end] for start, end in rendered.learned]


def whole_ids(row, tokenizer):
    """What transformers itself makes of the row, in the shape that the template wants."""
    found = []
    for in_parts, as_text in chat._shapes(row["messages"]):
        shape = chat._Chat(row, tokenizer, in_parts, as_text)
        messages = [shape._shaped(message) for message in row["messages"]]
        try:
            made = tokenizer.apply_chat_template(messages, tools=row.get("tools"), return_dict=True)
        except Exception:
            continue
        found.append(made["input_ids"])
    return found


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_of_trl(name, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", Path(TEMPLATES[name]).read_text())
    for kind, row in ROWS.items():
        try:
            (example,) = data.tokenize([row], tokenizer, 9999).examples
        except OnnError as error:
            assert kind in ("tools", "reasoning") and "row 1 does not fit" in str(error)
            continue
        n_tokens = len(example.input_ids)
        assert example.input_ids in [ids[:n_tokens] for ids in whole_ids(row, tokenizer)]
        learned = tokenizer.decode([i for i in example.labels if i != data.IGNORED])
        for message in row["messages"]:
            if message["role"] == "assistant":
                assert (
                    message["content"] in learned
                    and message.get("reasoning_content", "") in learned
                )
            elif message["role"] == "user":
                assert message["content"] not in learned
        if kind == "tools":
            assert "get_weather" in learned and "Oslo" in learned and "degrees" not in learned
    assert data.prompt_ids("Where?", tokenizer)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith("_training")])
def test_answers_are_found_where_the_marks_are(name, tokenizer, monkeypatch):
    """Without its marks a template's answers are found all the same, up to header and newline."""
    text = Path(TEMPLATES[name]).read_text()
    for kind in ("one turn", "two turns"):
        found = []
        for template in (text, MARKS.sub(r"{%\1 if true \3%}{%\1 endif \3%}", text)):
            monkeypatch.setattr(tokenizer, "chat_template", template)
            found.append("".join(learned_texts(ROWS[kind], tokenizer)))
        marked, unmarked = (HEADS.sub("", text) for text in found)
        assert unmarked == marked


def test_smollm2_is_as_it_was_when_segments_were_tokenized(tokenizer):
    """The old way: prompt and answer, each tokenized alone."""
    for prompt, response in (("Hi", "Yes."), ("What is 2 + 2?\n", "4"), ("é ü?", "A b.\n\nC d")):
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        (example,) = data.tokenize([{"messages": turns}], tokenizer, 999).examples
        asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
        asked, said = (tokenizer(text)["input_ids"] for text in (asked, response + "<|im_end|>"))
        assert example.input_ids == asked + said
        assert example.labels == [data.IGNORED] * len(asked) + said
        assert data.prompt_ids(prompt, tokenizer) == asked


def test_settings_say_what_is_learned(tokenizer):
    def learned(turns, **settings):
        (example,) = data.tokenize([{"messages": turns}], tokenizer, 999, **settings).examples
        return tokenizer.decode([i for i in example.labels if i != data.IGNORED])

    other = {"role": "assistant", "content": "Madrid."}
    turns = [USER, ANSWER, USER, other]
    assert learned(turns) == "Lisbon.<|im_end|>Madrid.<|im_end|>"
    assert learned(turns, train_on="last") == "Madrid.<|im_end|>"
    assert learned([USER, ANSWER | {"weight": 0}, USER, other]) == "Madrid.<|im_end|>"
    assert "Where?" in learned(turns, completion_only=False)


def test_template_that_drops_something_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}{{ m.role }}{% endfor %}"
    )
    with pytest.raises(
        DataError, match="row 1 does not fit .* in turn 1 is not in what it renders"
    ):
        data.tokenize([ROWS["one turn"]], tokenizer, 99)
    with pytest.raises(DataError, match="the prompt .* does not fit"):
        data.prompt_ids("Where?", tokenizer)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chat_template_kwargs": {"continue_final_message": True}}, "continue_final_message"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
        ({"messages": [USER | {"name": "Ann"}, ANSWER]}, "the name in turn 1"),
    ],
)
def test_what_the_template_does_not_use_is_named(changes, reason, tokenizer):
    with pytest.raises(DataError, match=f"row 1 does not fit .*{reason}"):
        data.tokenize([ROWS["one turn"] | changes], tokenizer, 99)


@pytest.mark.parametrize("word", ["", "{# developer #}"])
def test_a_developer_is_one_where_the_template_knows_it(word, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", word + tokenizer.chat_template)
    rows = data.load_rows([{"messages": [USER | {"role": "developer"}, USER, ANSWER]}])
    text = tokenizer.decode(data.tokenize(rows, tokenizer, 99).examples[0].input_ids)
    assert ("developer" if word else "system") + "\nWhere?" in text


def test_a_text_that_begins_with_bos_gets_no_other(tokenizer, monkeypatch):
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    both = [(bos, tokenizer.bos_token_id)]
    adding = TemplateProcessing(single=f"{bos} $A", special_tokens=both)
    monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", adding)
    plain, rendered = data.tokenize([{"text": "Hi."}, {"text": bos + "Hi."}], tokenizer, 9).examples
    assert plain == rendered and plain.input_ids[:2].count(tokenizer.bos_token_id) == 1


def test_reasoning_that_is_left_out_of_what_is_not_learned_is_counted(tokenizer):
    row = ROWS["reasoning"]["messages"]
    turns = [row[0], row[1] | {"weight": 0}, USER, ANSWER]
    assert data.tokenize([{"messages": turns}], tokenizer, 99).reasoning_left_out == 1


def table(tokenizer):
    """The walk as Markdown."""
    yield "| template | one turn | two turns | tools | reasoning | learned of two turns; why not |"
    yield "|---|---|---|---|---|---|"
    for name, path in TEMPLATES.items():
        tokenizer.chat_template, cells, why = Path(path).read_text(), [], []
        for kind, row in ROWS.items():
            try:
                learned = learned_texts(row, tokenizer)
                cells.append("equal")
                why += [" / ".join(learned)] if kind == "two turns" else []
            except OnnError as error:
                cells.append("refused")
                why.append(f"{kind}: {str(error).partition('template: ')[2]}")
        text = "; ".join(why).replace("\n", "\\n").replace("|", "\\|")
        yield f"| {name} | {' | '.join(cells)} | `{text}` |"


if __name__ == "__main__":
    from onn_core import prepare_default_model

    os.environ["HF_HUB_OFFLINE"] = "1"
    lines = table(AutoTokenizer.from_pretrained(prepare_default_model()))
    Path(__file__).with_name("templates.md").write_text("\n".join(lines) + "\n")
