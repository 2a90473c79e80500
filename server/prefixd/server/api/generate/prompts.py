"""From the text of a request to the tokens of its prompt, with places for virtual tokens.

The text between two virtual tokens is tokenized as one run, whether it is the template's or the
request's. Only the first run gets the model's opening tokens: after the virtual tokens in front, as
in PEFT. For an encoder, the last run gets the closing ones. The text of a request is never parsed:
what looks like a marker in it is text.
"""

import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from prefixd.server.api.generate.conversation import Conversation
from prefixd.server.api.generate.embeds import Given
from prefixd.server.api.generate.messages import ChatMessage, PrefixPart
from prefixd.server.api.generate.tool_plan import ToolPlan
from prefixd.server.api.generate.turns import turn_of
from prefixd.server.api.placement import Layout, lay_out
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.inputs import PLACEHOLDER, InputRun
from prefixd.server.errors import BadRequest
from prefixd.store.artifact.template import PROMPT, Prompt, Rows, rows_problem
from prefixd.store.store import Manifest

Run = str | Sequence[int] | Rows | Given
"""Text, token ids, virtual tokens, or embeddings of the request."""


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Token ids of a prompt, with placeholders for virtual tokens; ``rows`` says which, and at
    which place they begin. ``given`` are the embeddings of the request, in place of others.
    ``text`` is what was tokenized, where that is one text."""

    token_ids: tuple[int, ...]
    rows: tuple[tuple[int, Rows], ...] = ()
    given: tuple[InputRun, ...] = ()
    text: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are not virtual."""
        return len(self.token_ids) - sum(rows.stop - rows.start for _, rows in self.rows)

    def behind(self, rows: Rows) -> "PromptTokens":
        """The prompt behind these virtual tokens."""
        size = rows.stop - rows.start
        return PromptTokens(
            (PLACEHOLDER,) * size + self.token_ids,
            ((0, rows), *((place + size, each) for place, each in self.rows)),
            tuple(replace(run, place=run.place + size) for run in self.given),
            self.text,
        )


def counted(*counts: tuple[int, str]) -> str:
    """``4 virtual tokens and 9 tokens of output``: the counts that are not 0, in words."""
    *others, last = [
        f"{count} {what.replace('tokens', 'token') if count == 1 else what}"
        for count, what in counts
        if count
    ]
    return f"{', '.join(others)} and {last}" if others else last


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Tokenizes prompts for the served model."""

    served: ServedModel
    render_chat: Callable[..., str] | None = None
    """In place of the model's chat template, with the arguments and errors of ``Tokenizer``'s."""

    def completion(
        self, prompt: str | list[int] | Given, layout: Layout | None, *, continues: bool
    ) -> PromptTokens:
        """Tokens of a prompt in its place. A text that ``continues`` a text prefix has no opening
        tokens: the prefix has them. Raises BadRequest."""
        runs = _in_place(prompt, layout)
        return self._encode(runs, opens=not continues, continues=continues, param="prompt")

    def chat(
        self, rendered: Sequence[str | Rows], layout: Layout | None, *, continues: bool
    ) -> PromptTokens:
        """Tokens of a rendered conversation, whose template has written the opening tokens. Raises
        BadRequest."""
        if any(isinstance(piece, Rows) for piece in rendered):
            assert layout is not None
            runs: list[Run] = [p for p in layout.pieces if not isinstance(p, Prompt)]
        else:
            runs = _in_place("".join(map(str, rendered)), layout)
        return self._encode(runs, opens=False, continues=continues, param="messages")

    def render(self, conversation: Conversation, tools: ToolPlan | None = None) -> list[str | Rows]:
        """The conversation in the model's chat template, split at its prefix parts. Raises
        BadRequest."""
        marks = _Marks()
        turns = [turn_of(message, marks.text_of(message)) for message in conversation.messages]
        try:
            render = self.render_chat or self.served.tokenizer.render_chat
            text = render(
                tools.turns(turns) if tools else turns,
                tools=tools.variables if tools else None,
                add_generation_prompt=conversation.opens_turn,
                continue_final_message=bool(conversation.continue_final_message),
                template_kwargs=conversation.template_variables,
            )
        except ValueError as error:
            raise BadRequest(str(error), code="chat_template", param="messages") from error
        return marks.split(writable(text))

    def _encode(
        self, runs: Iterable[Run], *, opens: bool, continues: bool, param: str
    ) -> PromptTokens:
        tokenizer, token_ids = self.served.tokenizer, list[int]()
        rows, given, joined = [], [], list(_joined(runs))
        for run in joined:
            if isinstance(run, Given):
                given.append(InputRun(len(token_ids), run.payload))
                token_ids += [PLACEHOLDER] * run.payload.num_rows
                continue
            if isinstance(run, Rows):
                rows.append((len(token_ids), run))
                token_ids += [PLACEHOLDER] * (run.stop - run.start)
                continue
            ids = run
            if isinstance(ids, str):
                ids = tokenizer.encode(ids, add_special_tokens=opens and not token_ids)
                ids = tokenizer.without_opening(ids) if continues else ids
            check_token_ids(ids, self.served.vocab_size, param=param)
            token_ids += ids
        if opens and isinstance(run, str) and self.served.encoder is not None:
            token_ids += tokenizer.closing
        if not token_ids:
            raise BadRequest(
                "expected a prompt of at least one token; received an empty one", param=param
            )
        text = joined[0] if len(joined) == 1 and isinstance(joined[0], str) else None
        return PromptTokens(tuple(token_ids), tuple(rows), tuple(given), text)


def writable(text: str) -> str:
    """``text`` with question marks for halves of surrogate pairs, which no tokenizer reads. They
    come from escapes: in the arguments of a call, or in a template of a tenant."""
    return text.encode(errors="replace").decode()


class _Marks:
    """Stands for prefix parts in a conversation while it is rendered: text that no message can
    contain, of letters and digits alone, which templates leave as they are."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(16)
        self._parts: list[PrefixPart] = []

    def text_of(self, message: ChatMessage) -> str:
        """The content of a message as one string. A line break joins text to text."""
        if isinstance(message.content, str | None):
            return message.content or ""
        text, after_text = "", False
        for part in message.content:
            if isinstance(part, PrefixPart):
                text += self._mark(len(self._parts))
                self._parts.append(part)
            else:
                text += "\n" * after_text + part.text
            after_text = not isinstance(part, PrefixPart)
        return text

    def split(self, text: str) -> list[str | Rows]:
        """The rendered text with the parts in place of their marks. Raises BadRequest."""
        pieces: list[str | Rows] = []
        for index, part in enumerate(self._parts):
            before, mark, text = text.partition(self._mark(index))
            if not mark:
                break
            pieces += [before, Rows(part.start, part.stop)]
        else:
            if self._nonce not in text:
                return [piece for piece in (*pieces, text) if piece]
        raise BadRequest(
            "expected a chat template that writes each message once and in order around its parts "
            "of type prefix; the model's drops, repeats or reorders them",
            code="chat_template",
            param="messages",
        )

    def _mark(self, index: int) -> str:
        return f"PREFIX{self._nonce}N{index}N"


def chat_layout(
    rendered: Sequence[str | Rows], manifest: Manifest | None, template: Layout | None
) -> Layout | None:
    """The layout of a conversation: by its prefix parts, if it has any, else by the ``template`` of
    the version. Raises BadRequest for parts that do not fit the version."""
    rows = [piece for piece in rendered if isinstance(piece, Rows)]
    if not rows:
        return template
    if manifest is None:
        raise _misplaced("a soft prompt as the model", "the base model, which has none")
    version = manifest.reference
    if not manifest.kind.is_soft:
        raise _misplaced("a soft prompt as the model", f"{version} of kind {manifest.kind}")
    if template is not None:
        raise _misplaced(
            "virtual tokens that the version's prompt_template does not place", version
        )
    problem = rows_problem(rows, manifest.num_virtual_tokens)
    if problem is not None:
        raise _misplaced(*problem)
    return lay_out(rendered, manifest.num_virtual_tokens)


def _misplaced(expected: str, received: str) -> BadRequest:
    return BadRequest(
        f"content parts of type prefix: expected {expected}; received {received}",
        code="misplaced_prefix",
        param="messages",
    )


def _in_place(prompt: str | list[int] | Given, layout: Layout | None) -> list[Run]:
    pieces = (PROMPT,) if layout is None else layout.pieces
    return [prompt if isinstance(piece, Prompt) else piece for piece in pieces]


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """The runs, with text next to text as one."""
    text: str | None = None
    for run in runs:
        if isinstance(run, str):
            text = (text or "") + run
            continue
        if text is not None:
            yield text
            text = None
        yield run
    if text is not None:
        yield text


def check_token_ids(token_ids: Collection[int], limit: int, *, param: str) -> None:
    """Raise BadRequest for an id that is negative or not below ``limit``."""
    lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
    if lowest < 0 or highest >= limit:
        raise BadRequest(
            f"expected token ids from 0 to {limit - 1}, in a vocabulary of {limit}; "
            f"received {lowest if lowest < 0 else highest}",
            param=param,
        )
