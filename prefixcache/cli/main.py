"""`prefixcache`: the commands of this package, and those of others that plug in.

Exit codes, the same for every command, those of plug-ins, too (`codes.py`):

```
0  ok, also where the reader of a pipe has seen enough    3    no service (the message starts one)
1  a negative answer                                      4    `serve` cannot have what it needs
2  wrong usage                                            5    a fault of ours, or of the output
                                                          130  Ctrl-C
```
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from prefixcache.cli import plugins, streams, variables
from prefixcache.cli.codes import (
    EXIT_INTERRUPTED,
    EXIT_NEGATIVE,
    EXIT_NO_SERVER,
    EXIT_OK,
    EXIT_USAGE,
)
from prefixcache.errors import CacheError, InvalidRequest, ServiceUnavailable, Unsupported

app = typer.Typer(
    name="prefixcache",
    cls=plugins.PluginGroup,
    help="One KV cache for all LLM serving processes of a machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(plugins.version())
        raise typer.Exit


def _credential(flag: str, variable: str, text: str) -> Any:
    return typer.Option(
        flag,
        metavar="FILE",
        help=f"{text} Default: $PREFIXCACHE_{variable}.",
        rich_help_panel="Access",
        show_default=False,
    )


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            "-v",
            help="Show the version, and what the core runs as.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
    token_file: Annotated[
        str | None, _credential("--token-file", "TOKEN_FILE", "File with the bearer token.")
    ] = None,
    tls_ca: Annotated[
        str | None, _credential("--tls-ca", "TLS_CA", "Speak TLS; who signed the service.")
    ] = None,
    tls_cert: Annotated[
        str | None, _credential("--tls-cert", "TLS_CERT", "Show this certificate.")
    ] = None,
    tls_key: Annotated[str | None, _credential("--tls-key", "TLS_KEY", "Its key.")] = None,
) -> None:
    given = {
        "TOKEN_FILE": token_file,
        "TLS_CA": tls_ca,
        "TLS_CERT": tls_cert,
        "TLS_KEY": tls_key,
    }
    # Where the client looks: every command connects alike, those of plug-ins, too.
    os.environ.update({f"PREFIXCACHE_{name}": value for name, value in given.items() if value})


def main() -> None:
    """Run the command line; what ends it is told in one line, and by the exit code."""
    sys.exit(streams.guarded(_run))


def _run() -> int:
    for warning in variables.unknown(os.environ):
        streams.say(warning)
    command = typer.main.get_command(app)
    try:
        command._main_shell_completion({}, "prefixcache")
        # Not `main`: to that, a reader of a pipe who has seen enough is a failure.
        with command.make_context("prefixcache", sys.argv[1:]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except CacheError as error:
        streams.say(str(error))
        return _exit_code(error)
    except typer.Abort:
        streams.say("given up")
        return EXIT_INTERRUPTED
    except ModuleNotFoundError as error:
        if not (hint := plugins.missing(error)):
            raise
        streams.say(hint)
        return EXIT_USAGE
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "show"):
            raise
        if isinstance(getattr(error, "message", None), str):  # has words of the user in it
            error.message = streams.fit(error.message)  # type: ignore[attr-defined]
        error.show()  # wrong usage: typer writes it
        return int(error.exit_code)
    return EXIT_OK


def _exit_code(error: CacheError) -> int:
    if isinstance(error, ServiceUnavailable):
        return EXIT_NO_SERVER
    if isinstance(error, InvalidRequest | Unsupported):
        return EXIT_USAGE
    return EXIT_NEGATIVE
