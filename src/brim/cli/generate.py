"""`brim generate MODEL PROMPT`: text as it comes, then how fast it came."""

from typing import Annotated

import typer

from brim import units
from brim.cli import console, options
from brim.report import SCHEMA


def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Name, Hub id or local directory.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text goes on from.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens.")] = 128,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template, if it has one.")] = True,
    format: options.PackedFormat = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Text, tokens per second, resident bytes. Models with packed weights run in BF16."""
    import torch

    from brim.inference import generate, load, locate

    with console.progress(f"preparing {model}") as listen:
        directory = locate(model, progress=listen)
    # BF16: the only format for which torch's kernels on a CPU read packed weights fast
    loaded = load(directory, pack=format, compute=torch.bfloat16)
    if json:
        made = generate(loaded, prompt, max_tokens=max_tokens, chat=chat)
        console.print_json({"schema": SCHEMA, "model": model, "prompt": prompt, **made.to_dict()})
        return
    made = generate(loaded, prompt, max_tokens=max_tokens, chat=chat, listen=_print_piece)
    print()
    after_first = f", {made.decode_tokens_per_s:.1f} after the first" if made.decode_tokens_per_s else ""
    console.note(
        f"{made.new_tokens} tokens at {made.tokens_per_s:.1f} tokens/s{after_first}; "
        f"{units.format_bytes(made.resident_bytes)} resident"
    )


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)
