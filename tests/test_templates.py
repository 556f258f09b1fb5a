"""Chat templates: every one that TRL ships trains to the whole text's own tokens, or is refused.

`python tests/test_templates.py` writes tests/templates.md and the table of it in tests/README.md.
"""

import contextlib
import glob
import importlib.util
import json
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
OTHER = {"role": "assistant", "content": "In Madrid, I think."}
SYSTEM = {"role": "system", "content": "Be terse."}
THOUGHT = ANSWER | {"reasoning_content": "A port."}
ROWS = {
    "one turn": {"messages": [USER, ANSWER]},
    "two turns": {"messages": [USER, ANSWER, USER, OTHER]},
    "system": {"messages": [SYSTEM, USER, ANSWER, USER, OTHER]},
    "tools": {
        "messages": [
            {"role": "user", "content": "Weather in Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "get_weather", "content": "-3 degrees"},
            {"role": "assistant", "content": "Cold."},
        ],
        "tools": [{"type": "function", "function": TOOL}],
    },
    "reasoning": {"messages": [USER, THOUGHT]},
    "earlier reasoning": {"messages": [USER, THOUGHT, USER, OTHER]},
}
TABLE = Path(__file__).with_name("templates.md")
README = Path(__file__).with_name("README.md")
SPECIAL = re.compile(r"<[|｜/]?[a-zA-Z0-9_▁]+[|｜]?>|\[/?[A-Z_]+\]")


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir):
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def special(smollm2_dir):
    return with_special_tokens(smollm2_dir)


def with_special_tokens(folder):
    """The default tokenizer, to which what the templates mark turns with is one token each."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {token for path in TEMPLATES.values() for token in SPECIAL.findall(read(path))}
    tokenizer.add_tokens(sorted(found), special_tokens=True)
    return tokenizer


def read(path):
    return Path(path).read_text(encoding="utf-8")


def learned_texts(row, tokenizer):
    rendered = chat.render(row, tokenizer)
    return [rendered.text[start:end] for start, end in rendered.learned]


def shapes(row):
    """The row's messages as one template or another wants them."""
    for in_parts in (False, True):
        for as_text in (False, True):
            messages = json.loads(json.dumps(row["messages"]))
            for message in messages:
                if in_parts:
                    message["content"] = [{"type": "text", "text": message["content"]}]
                for call in message.get("tool_calls", ()) if as_text else ():
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            yield messages


def require_equal(example, row, tokenizer):
    """The example is what transformers makes of the whole row, its labels what this says is said.

    That is the template's own marks, if it has them. Elsewhere every token of an answer's text,
    arguments and reasoning counts, with the token that ends the turn, no token of another message,
    and none of the generation prompt.
    """
    marked = bool(MARKS.search(tokenizer.chat_template))
    settings = {"tools": row.get("tools"), "return_dict": True}
    asked = {"return_assistant_tokens_mask": marked}
    offsets = {"tokenizer_kwargs": {"return_offsets_mapping": True}}
    n_tokens, whole = len(example.input_ids), None
    for messages in shapes(row):
        with contextlib.suppress(Exception):  # this template takes another shape
            made = tokenizer.apply_chat_template(messages, **settings, **asked, **offsets)
            if made["input_ids"][:n_tokens] == example.input_ids:
                whole = made, messages
                break
    assert whole
    made, messages = whole
    counted = [label != data.IGNORED for label in example.labels]
    counted += [False] * (len(made["input_ids"]) - n_tokens)
    if marked:
        assert counted == [bool(mask) for mask in made["assistant_masks"]]
    text = tokenizer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False)

    def counts(start, end):
        pairs = zip(counted, made["offset_mapping"], strict=True)
        return {count for count, (a, b) in pairs if a < end and b > start}

    at, left_out = 0, 0
    for i, message in enumerate(row["messages"]):
        ours, before = message["role"] == "assistant", at
        said = [value for name in chat.REASONING if (value := message.get(name))]
        if said and i + 1 < len(messages) and said[0] not in text:
            said, left_out = [], left_out + 1
        for call in message.get("tool_calls", ()):
            said += [call["function"]["name"], *call["function"]["arguments"].values()]
        places = [text.index(part, at) for part in [*said, message["content"]]]
        for place, part in zip(places, [*said, message["content"]], strict=True):
            assert not part or counts(place, place + len(part)) == {ours}
            at = max(at, place + len(part))
        if ours and not marked:
            prompt = tokenizer.apply_chat_template(
                messages[:i], tools=row.get("tools"), tokenize=False, add_generation_prompt=True
            )
            if text.startswith(prompt):
                pairs = zip(counted, made["offset_mapping"], strict=True)
                assert not any(count for count, (a, b) in pairs if a >= before and b <= len(prompt))
            end = chat.END_OF_TURN.match(text, at)
            if message["content"] and not tokenizer.chat_template.startswith("[gMASK]"):
                assert counts(*end.span(1)) == {True}
    return left_out


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_of_trl(name, special, monkeypatch):
    monkeypatch.setattr(special, "chat_template", read(TEMPLATES[name]))
    line = table_line(name, special)
    known = re.search(rf"^\| {name} \|.*$", read(TABLE), re.MULTILINE)
    assert not known or known[0] == line
    assert data.prompt_ids("Where?", special)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith("_training")])
def test_answers_are_found_where_the_marks_are(name, tokenizer, monkeypatch):
    """Without its marks a template's answers are found all the same, up to header and newline."""
    text = read(TEMPLATES[name])
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
    for silent in (ANSWER | {"weight": 0}, ANSWER | {"content": "\n"}):
        assert learned([USER, silent, USER, other]) == "Madrid.<|im_end|>"
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


def walked(tokenizer):
    """Of each kind of row: "equal" or "refused", and what is learned, or why not."""
    for kind, row in ROWS.items():
        try:
            found = data.tokenize([row], tokenizer, 9999)
        except OnnError as error:
            assert "row 1 does not fit" in str(error)
            yield kind, "refused", str(error).partition("template: ")[2].partition(". Begin")[0]
            continue
        left_out = require_equal(found.examples[0], row, tokenizer)
        assert found.reasoning_left_out == left_out
        yield kind, "equal", " / ".join(learned_texts(row, tokenizer))


def table_line(name, tokenizer):
    found = list(walked(tokenizer))
    why = [text for kind, cell, text in found if kind == "two turns"]
    why += [f"{kind}: {text}" for kind, cell, text in found if cell == "refused"]
    text = "; ".join(why).replace("\n", "\\n").replace("|", "\\|")
    return f"| {name} | {' | '.join(cell for _, cell, _ in found)} | `{text}` |"


def summary(lines):
    """The templates that have the same outcomes, a row each; then all of them."""
    cells = [[cell.strip() for cell in line.split("|")[1 : len(ROWS) + 2]] for line in lines]
    alike = {}
    for name, *outcome in cells:
        alike.setdefault(tuple(outcome), []).append(name)
    yield f"| templates | {' | '.join(ROWS)} |"
    yield "|---" * (len(ROWS) + 1) + "|"
    for outcome, names in alike.items():
        yield f"| {', '.join(names)} | {' | '.join(outcome)} |"
    n_equal = [str(sum(row[i] == "equal" for row in cells)) for i in range(1, len(ROWS) + 1)]
    yield f"| **equal, of {len(cells)}** | {' | '.join(n_equal)} |"


def test_the_table_in_the_readme():
    assert "\n".join(summary(read(TABLE).splitlines()[2:])) in read(README)


if __name__ == "__main__":
    from onn_core import prepare_default_model

    os.environ["HF_HUB_OFFLINE"] = "1"
    tokenizer = with_special_tokens(prepare_default_model())
    lines = [f"| template | {' | '.join(ROWS)} | learned of two turns; why not |"]
    lines.append("|---" * (len(ROWS) + 2) + "|")
    for name in TEMPLATES:
        tokenizer.chat_template = read(TEMPLATES[name])
        lines.append(table_line(name, tokenizer))
    TABLE.write_text("\n".join(lines) + "\n")
    rows = "\n".join(summary(lines[2:]))
    old = re.compile(r"^\| templates \|.*?^\| \*\*equal[^\n]*", re.MULTILINE | re.DOTALL)
    README.write_text(old.sub(lambda _: rows, read(README)))
