"""Conversations as the chat template renders them, and where the answers are in that text.

The whole conversation is rendered once and later tokenized once. Where the template marks what the
assistant generates, its marks are taken. Elsewhere an answer begins where the generation prompt
ends and ends with its end-of-turn token. Many templates render an earlier turn otherwise than the
last one (they drop its reasoning, or close it with another token); there a second rendering, with
a mark in place of the answer, shows which part of the whole text is the answer's.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Sequence
from itertools import product, zip_longest
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from onn_core.data.rows import SYSTEM_ROLES, Message, Row
from onn_core.data.tokenizer import explained
from onn_core.errors import DataError

Span = tuple[int, int]  # characters of a text, from and up to
GENERATION = re.compile(r"\{%-?\+?\s*generation\s*[-+]?%\}")
MARK = "Zq0answer0qZ"  # in place of an answer; no template changes letters and digits
END_OF_TURN = re.compile(r"\s*(<[^<>\s]{1,60}>|\[[A-Z_/]{2,30}\])")
REASONING = ("reasoning_content", "reasoning", "thinking")
RENDER_ARGUMENTS = {"messages", "tools", "documents", "add_generation_prompt"}
MIN_HEADER = 4  # characters of a generation prompt that are enough to know it by


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A conversation's text; which characters are learned, and which must not be."""

    text: str
    learned: list[Span]
    unlearned: list[Span]
    reasoning_left_out: int = 0  # earlier answers whose reasoning the template does not repeat


def render(row: Row, tokenizer: Any, train_on: str = "all", for_answer: bool = False) -> Rendered:
    """The text of a conversation, with the answers that are learned: "all" of them or the "last".

    A turn of weight 0 is not learned, nor an empty one. Without a chat template turns are joined by
    newlines. for_answer: with the beginning of one more answer. Raises DataError if the template
    does not take the row, or leaves out something of it.
    """
    messages = row["messages"]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = {i for i in answers if messages[i].get("weight", 1) and _says_something(messages[i])}
    if train_on == "last":
        learned &= {answers[-1]} if answers else set()
    if not tokenizer.chat_template:
        return _joined(row, tokenizer, answers, learned)
    problem, got_to = None, -1
    calls = any(message.get("tool_calls") for message in messages)
    # A template wants the same conversation written in one of these ways or another.
    for in_parts, as_text in product((False, True), (False, True)[: 1 + calls]):
        chat = _Chat(row, tokenizer, in_parts, as_text)
        try:
            with explained("it cannot be rendered"):
                return chat.rendered(answers, learned, for_answer)
        except DataError as error:  # of several shapes, the reason of the one that got farthest
            if chat.stage > got_to:
                problem, got_to = error, chat.stage
    reason = str(problem).rstrip(".")
    raise DataError(f"does not fit the model's chat template: {reason}") from problem


def prompt_ids(prompt: str, tokenizer: Any) -> list[int]:
    """The tokens that a model is given before it answers `prompt`, as in training.

    Raises DataError if the chat template does not render a user's turn.
    """
    row: Row = {"messages": [{"role": "user", "content": prompt}]}
    try:
        with explained("cannot be tokenized"):
            text = render(row, tokenizer, for_answer=True).text
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except DataError as error:
        raise DataError(f"the prompt {prompt!r:.60} {error}.") from error


class _Chat:
    """One conversation in one shape, and what the chat template makes of it."""

    def __init__(self, row: Row, tokenizer: Any, content_in_parts: bool, arguments_as_text: bool):
        self.tokenizer = tokenizer
        self.tools = row.get("tools")
        self.given = row.get("chat_template_kwargs", {})
        with explained("the tokenizer's chat template cannot be taken"):
            self.template = tokenizer.get_chat_template(tools=self.tools)
            self.marked = bool(GENERATION.search(self.template))
        self.in_parts = content_in_parts
        self.as_text = arguments_as_text
        self.messages = row["messages"]
        self.stage = 0  # 1: it can be rendered, 2: the answers are found in it

    def _mentions(self, word: str) -> bool:
        return re.search(rf"\b{re.escape(word)}\b", self.template) is not None

    def rendering(
        self, messages: list[Message], for_answer: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and the spans of the template's generation marks if it has them."""
        if not messages:
            return "", []
        texts, spans = render_jinja_template(
            conversations=[[self._shaped(message) for message in messages]],
            tools=self.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=self.marked,
            add_generation_prompt=for_answer,
            **self.tokenizer.special_tokens_map | self.given,
        )
        return texts[0], [tuple(span) for span in spans[0]] if self.marked else []

    def text(self, messages: list[Message], for_answer: bool = False) -> str:
        return self.rendering(messages, for_answer)[0]

    def _shaped(self, message: Message) -> Message:
        message = {key: value for key, value in message.items() if key != "weight"}
        if message["role"] == "developer" and not self._mentions("developer"):
            message["role"] = "system"
        if self.in_parts:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if message.get("tool_calls"):
            message["tool_calls"] = [self._shaped_call(call) for call in message["tool_calls"]]
        return message

    def _shaped_call(self, call: Any) -> Any:
        """A tool call whose arguments are an object, or its JSON text."""
        if "function" in call:
            return call | {"function": self._shaped_call(call["function"])}
        arguments = call.get("arguments", {})
        if self.as_text and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        elif not self.as_text and isinstance(arguments, str):
            arguments = json.loads(arguments)
        return call | {"arguments": arguments}

    def rendered(self, answers: list[int], learned: set[int], for_answer: bool) -> Rendered:
        for name in self.given:
            if name in RENDER_ARGUMENTS or not self._mentions(name):
                raise DataError(f"it has no use for {name} of chat_template_kwargs")
        whole, marks = self.rendering(self.messages, for_answer)
        self.stage = 1
        spans: dict[int, list[Span]] = {}
        end = 0
        for i, following in zip_longest(answers, answers[1:]):
            if self.marked:
                spans[i] = self._marked_spans(i, following, marks)
            else:
                spans[i] = [self._span(i, whole, end)]
            end = max([end, *(span[1] for span in spans[i])])
        left_out = self._require_whole(whole, spans, learned)
        return Rendered(
            whole,
            [span for i in answers if i in learned for span in spans[i]],
            [span for i in answers if i not in learned for span in spans[i]],
            left_out,
        )

    def _marked_spans(self, i: int, following: int | None, marks: list[Span]) -> list[Span]:
        """The spans that the template marks as generated in message `i`, up to the next answer."""
        first = len(self.rendering(self.messages[:i], for_answer=True)[1])
        last = len(marks)
        if following is not None:  # up to it a turn is rendered as in the whole conversation
            last = len(self.rendering(self.messages[:following], for_answer=True)[1])
        return [(start, end) for start, end in marks[first:last] if start < end]

    def _span(self, i: int, whole: str, after: int) -> Span:
        """Where answer `i` is in the whole text, its end-of-turn token included."""
        before, rest = self.messages[:i], self.messages[i + 1 :]
        if not before:
            raise DataError("it begins with the assistant's turn")
        prompt = self.text(before, for_answer=True)
        until = self.text(self.messages[: i + 1]) if rest else whole
        if whole.startswith(prompt) and whole.startswith(until) and len(until) > len(prompt):
            return self._trimmed(i, whole, len(prompt), len(until))
        mark = {"role": "assistant", "content": MARK}
        marked = self.text([*before, mark, *rest])
        at = marked.find(MARK)
        if at < 0:
            raise DataError(f"what the assistant says in turn {i + 1} is not in what it renders")
        start = self._start(before, prompt, whole, after, n_common(whole, marked[:at]))
        if not rest:
            return self._trimmed(i, whole, start, len(whole))
        reply = until[self._start(before, prompt, until, 0, n_common(until, marked[:at])) :]
        if whole.startswith(reply, start):
            return self._trimmed(i, whole, start, start + len(reply))
        # It is rendered otherwise than as the last turn: what follows the answer tells its end.
        last = self.text([*before, mark])
        closing = last[last.find(MARK) + len(MARK) :]
        content_end = len(whole) - n_common(whole[::-1], marked[at + len(MARK) :][::-1])
        if whole.startswith(closing, content_end):
            return self._trimmed(i, whole, start, content_end + len(closing))
        opening = prompt[n_common(prompt, self.text(before)) :].lstrip()
        found = END_OF_TURN.match(whole, content_end)
        if found and not (opening and opening.startswith(found[1])):
            return start, found.end()
        for token in self.tokenizer.all_special_tokens:
            if whole.startswith(token, content_end):
                return start, content_end + len(token)
        raise DataError(f"it rewrites turn {i + 1}, and where that ends cannot be told")

    def _start(self, before: list[Message], prompt: str, whole: str, after: int, limit: int) -> int:
        """Where an answer begins that lies in `whole` between `after` and about `limit`.

        The generation prompt may hold more than the turn's header, such as an opened <think>, that
        the whole text does not have: its longest beginning that is there is the header.
        """
        if whole.startswith(prompt):
            return len(prompt)
        header = prompt[n_common(prompt, self.text(before)) :]
        for length in range(len(header), min(MIN_HEADER, len(header)) - 1, -1):
            at = whole.rfind(header[:length], after, limit)
            if at >= 0 and header[:length].strip():
                return at + length
        return limit

    def _trimmed(self, i: int, whole: str, start: int, end: int) -> Span:
        """Without the whitespace after the end-of-turn token, if there is such a token."""
        reply = whole[start:end].rstrip()
        content = self.messages[i]["content"].strip()
        # Whitespace alone ends this turn; ">" is a part of most end-of-turn tokens, too.
        if content and reply.find(content) == len(reply) - len(content) >= 0:
            return start, end
        return start, start + len(reply)

    def _require_whole(self, whole: str, spans: dict[int, list[Span]], learned: set[int]) -> int:
        """DataError unless all that the row says is in the text, its answers in their spans."""
        texts, before = {}, 0
        for i, message in enumerate(self.messages):
            following = [a for j in spans if j > i for a, b in spans[j] if a < b]
            until = min(following, default=len(whole))
            first = 0 if message["role"] in SYSTEM_ROLES else before
            texts[i] = "".join(whole[a:b] for a, b in spans.get(i, [(first, until)]))
            before = max([before, *(b for _, b in spans.get(i, []))])
        for i, message in enumerate(self.messages):
            if not _is_in(message["content"].rpartition("</think>")[2], texts[i]):
                raise DataError(
                    f"what the {message['role']} says in turn {i + 1} is not in what it renders"
                )
        self.stage, left_out = 2, 0
        for i, message in enumerate(self.messages):
            calls = [call.get("function", call) for call in message.get("tool_calls", [])]
            given = [self._shaped_call(call).get("arguments") for call in calls]
            if not _is_in([[call.get("name", "") for call in calls], given], texts[i]):
                raise DataError(f"the tool call in turn {i + 1} is not in what it renders")
            thoughts = [message[name] for name in REASONING if message.get(name)]
            if "</think>" in message["content"]:
                thoughts += re.split("</?think>", message["content"])[:-1]
            if not _is_in(thoughts, texts[i]):
                last = i == len(self.messages) - 1
                if i in learned and (
                    last or not _is_in(thoughts, self.text(self.messages[: i + 1]))
                ):
                    raise DataError(f"the reasoning in turn {i + 1} is not in what it renders")
                left_out += 1
            if "name" in message and message["role"] != "tool":  # a tool's is in the call, too
                unnamed = {key: value for key, value in message.items() if key != "name"}
                others = [*self.messages[:i], unnamed, *self.messages[i + 1 :]]
                self._require_difference(whole, f"the name in turn {i + 1} is", messages=others)
        if self.tools:
            self._require_difference(whole, "the tools are", tools=None)
        return left_out

    def _require_difference(self, whole: str, what: str, **changes: Any) -> None:
        """DataError if the conversation without `what` is rendered to the same text."""
        other = copy.copy(self)
        vars(other).update(changes)
        try:
            without = other.text(other.messages)
        except Exception:  # the template insists on it
            return
        if without == whole:
            raise DataError(f"{what} not in what it renders")


def _joined(row: Row, tokenizer: Any, answers: list[int], learned: set[int]) -> Rendered:
    """Without a template: each turn ends with a newline, an answer with the end-of-text token."""
    beyond = row.keys() - {"messages"}
    for message in row["messages"]:
        beyond |= message.keys() & {"name", "tool_calls", *REASONING}
    if beyond:
        raise DataError(f"has {min(beyond)}, for which the tokenizer has no chat template")
    text, spans = "", {}
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        text = tokenizer.bos_token
    for i, message in enumerate(row["messages"]):
        start = len(text)
        text += message["content"]
        text += (tokenizer.eos_token or "") if i in answers else "\n"
        spans[i] = (start, len(text))
    return Rendered(
        text,
        [spans[i] for i in answers if i in learned],
        [spans[i] for i in answers if i not in learned],
    )


def _says_something(message: Message) -> bool:
    """An empty answer would teach to say nothing: most are cells that nobody filled in."""
    said = message["content"].strip(), *(message.get(name) for name in ("tool_calls", *REASONING))
    return any(said)


def n_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many characters, tokens or messages at the beginning are the same."""
    places = enumerate(zip(one, other, strict=False))
    return next((i for i, (x, y) in places if x != y), min(len(one), len(other)))


def _is_in(value: Any, text: str) -> bool:
    """Whether every text and number in `value` is in `text`, as it is or as JSON writes it."""
    if isinstance(value, dict):
        return all(_is_in(item, text) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_in(item, text) for item in value)
    if not isinstance(value, str):
        return json.dumps(value) in text or str(value) in text
    value = value.strip()
    as_json = (json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    if value in text or any(form in text for form in as_json):
        return True
    try:  # a tool's result, that the template writes in its own way
        return not isinstance(found := json.loads(value), str) and _is_in(found, text)
    except (ValueError, RecursionError):
        return False
