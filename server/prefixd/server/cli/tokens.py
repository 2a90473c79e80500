"""``prefixd tokenize`` and ``prefixd detokenize``, on a running server."""

from typing import Annotated

import typer

from prefixd.client.sync import Client
from prefixd.server.cli.inputs import argument_text, input_text
from prefixd.server.cli.options import JsonFlag, connected
from prefixd.server.cli.output import print_columns, print_json, printable

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A prefix (NAME, NAME@3, NAME@alias) or the base. Default: the base."
    ),
]
UserOption = Annotated[
    str | None, typer.Option("--user", "-u", help="Your end user, whose prefix the base has.")
]


@connected
def tokenize(
    client: Client,
    *,
    text: Annotated[
        str | None, typer.Argument(help="The text. Default: standard input, as it is.")
    ] = None,
    model: ModelOption = None,
    user: UserOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The text is the message of a chat, not a prompt.")
    ] = False,
    special: Annotated[
        bool, typer.Option("--special/--no-special", help="Add the opening tokens of a prompt.")
    ] = True,
    show: Annotated[
        bool, typer.Option("--show", help="One token a line, with what it stands for.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Print the ids of the tokens that a request would have, without those of its prefix."""
    read = input_text("-") if text is None else argument_text(text, name="TEXT")
    tokens = client.tokenize(
        None if chat else read,
        messages=[{"role": "user", "content": read}] if chat else None,
        model=model,
        user=user,
        add_special_tokens=None if special else False,
        return_token_strs=show or as_json,
    )
    if as_json:
        print_json(tokens)
    elif show:
        print_columns(
            ("ID", "TOKEN"), list(zip(tokens.tokens, tokens.token_strs or (), strict=True))
        )
    else:
        typer.echo(" ".join(map(str, tokens.tokens)))


@connected
def detokenize(
    client: Client,
    *,
    tokens: Annotated[list[int], typer.Argument(help="Token ids.", metavar="ID...")],
    model: ModelOption = None,
    user: UserOption = None,
) -> None:
    """Print the text of tokens, special ones written out."""
    typer.echo(printable(client.detokenize(tokens, model=model, user=user)))
