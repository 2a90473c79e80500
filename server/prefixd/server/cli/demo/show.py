"""What the demo prints: answers in a table, the proof, and commands to continue with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefixd.client.types import Prefix
from prefixd.server.cli.demo.plan import DemoRequest, Example, by_question
from prefixd.server.cli.demo.traffic import Answer
from prefixd.server.cli.output import printable

_SHOWN_LINES = 5


@dataclass(frozen=True, slots=True)
class Proof:
    """What /metrics reports about the demo's requests."""

    requests: int
    passes: int
    distinct_prefixes: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether at least one forward pass mixed prefixes."""
        return self.distinct_prefixes >= 2 and self.passes > 0


def print_uploaded(
    console: Console, example: Example, prefix: Prefix, *, first_use_s: float
) -> None:
    """One line for an upload, with the time of its first token."""
    kind = (prefix.peft_type or "text").lower()
    console.print(
        f"[green]✓[/green] {example.tenant} uploaded [bold]{prefix.reference}[/bold]: "
        f"{escape(example.summary)} [dim]({kind}, {prefix.num_virtual_tokens} virtual tokens, "
        f"{prefix.size_bytes / 1024:.0f} KiB, answered after {first_use_s * 1000:.0f} ms)[/dim]",
        highlight=False,
    )


def answers_table(requests: Sequence[DemoRequest], answers: Sequence[Answer]) -> Table:
    """All answers, grouped by question, the bare base first."""
    table = Table(expand=True, pad_edge=False, header_style="bold")
    table.add_column("tenant", no_wrap=True)
    table.add_column("prefix", no_wrap=True)
    table.add_column("first token", justify="right", no_wrap=True)
    table.add_column("answer", ratio=1)
    for group in by_question(requests):
        table.add_section()
        table.add_row("", "", "", f"[bold]{escape(printable(requests[group[0]].question))}[/bold]")
        for index in group:
            answer = answers[index]
            table.add_row(
                requests[index].tenant,
                escape(answer.prefix.reference) if answer.prefix else "[dim]bare base[/dim]",
                f"{answer.first_token_s * 1000:.0f} ms",
                escape(_excerpt(answer.text)) or "[dim](empty)[/dim]",
            )
    return table


def _excerpt(text: str) -> str:
    """The first lines of ``text``: enough to compare."""
    lines = [line for line in printable(text).splitlines() if line.strip()]
    excerpt = "\n".join(lines[:_SHOWN_LINES])
    return excerpt if len(lines) <= _SHOWN_LINES else f"{excerpt} …"


def print_proof(console: Console, proof: Proof) -> None:
    """The figures that show prefixes were mixed in one pass."""
    mark = "[green]✓[/green]" if proof.holds else "[red]✗[/red]"
    console.print(
        f"{mark} {proof.requests} concurrent requests took [bold]{proof.passes}[/bold] forward "
        f"passes in {proof.seconds:.1f} s; the fullest pass carried "
        f"[bold]{proof.distinct_prefixes}[/bold] distinct prefixes [dim](/metrics)[/dim]"
    )


def print_next_steps(
    console: Console, *, url: str, key: str, model: Example, upload: Example
) -> None:
    """The URL, a key and commands to paste; not wrapped, so that they stay on one line each."""
    question = model.prompts[0][-1]["content"].replace("'", "")
    program = ".venv/bin/prefixd" if Path(".venv/bin/prefixd").exists() else "prefixd"
    lines = [
        f"export PREFIXD_URL={url}",
        f"export PREFIXD_API_KEY={key}",
        "",
        "# generate under a prefix: its name is the model",
        'curl -s $PREFIXD_URL/v1/chat/completions -H "Authorization: Bearer $PREFIXD_API_KEY" \\',
        "  -H 'content-type: application/json' -d '{",
        f'    "model": "{model.name}", "max_tokens": {model.max_tokens}, "temperature": 0,',
        f'    "messages": [{{"role": "user", "content": "{question}"}}]}}\'',
        "",
        "# upload a prefix: what PEFT saved, as it is",
        *_upload_lines(upload),
        "",
        "# or from the command line",
        f"{program} prefix ls",
        f"{program} chat --model {model.name}",
    ]
    console.print()
    for line in lines:
        style = "dim" if line.startswith("#") else None
        console.print(line, style=style, soft_wrap=True, markup=False, highlight=False)


def _upload_lines(example: Example) -> list[str]:
    folder = _relative(example.folder)
    return [
        f"curl -s -X PUT $PREFIXD_URL/v1/prefixes/my-{example.name} \\",
        '  -H "Authorization: Bearer $PREFIXD_API_KEY" \\',
        f"  -F config=@{folder}/adapter_config.json -F weights=@{folder}/adapter_model.safetensors",
    ]


def _relative(path: Path) -> Path:
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path.resolve()
