"""`prefixcache encode`: the token ids of a text or a chat, as a model's tokenizer has them."""

from __future__ import annotations

from prefixcache.cli import decoder as decoding
from prefixcache.cli import source, view
from prefixcache.types import unpack


def encode(
    what: source.What = None,
    file: source.File = None,
    as_text: source.AsText = False,
    tokenizer: decoding.TokenizerPath = None,
    model: view.Model = None,
    as_json: view.AsJson = False,
) -> None:
    """Print the token ids of a text, or of a chat through the model's template.

    Needs no service.  What it prints is what `lookup`, `pin` and `explain` take.

    Example: prefixcache encode chat.json --tokenizer /models/my-model
    """
    spaces = view.Chosen(model, "", "", "")
    ids = unpack(source.encode(source.ask(what, file, as_text, tokenizer, spaces))).tolist()
    if as_json:
        view.print_json({"tokens": ids})
    else:
        view.tell(" ".join(map(str, ids)))
