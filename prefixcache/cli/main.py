"""`prefixcache`: the commands of this package, and those of others that plug in.

Exit codes: 0 ok, 1 a negative answer, 2 usage, 3 no server (the message has the command that starts
one).
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from prefixcache import __version__
from prefixcache.cli import plugins
from prefixcache.errors import CacheError, InvalidRequest, ServiceUnavailable, Unsupported

EXIT_NEGATIVE = 1
EXIT_USAGE = 2
EXIT_NO_SERVER = 3

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
        typer.echo(f"prefixcache {__version__}")
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
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
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
    """Run the command line; what a user can cause ends in one line, not in a traceback."""
    try:
        app(prog_name="prefixcache")
    except CacheError as error:
        typer.echo(f"prefixcache: {error}", err=True)
        sys.exit(_exit_code(error))
    except ModuleNotFoundError as error:
        if not (hint := plugins.missing(error)):
            raise
        typer.echo(f"prefixcache: {hint}", err=True)
        sys.exit(EXIT_USAGE)
    except BrokenPipeError:
        # The reader of a pipe has seen enough (`| head`): nothing is left to say, also not at exit.
        sys.stderr.close()
        sys.exit(0)


def _exit_code(error: CacheError) -> int:
    if isinstance(error, ServiceUnavailable):
        return EXIT_NO_SERVER
    if isinstance(error, InvalidRequest | Unsupported):
        return EXIT_USAGE
    return EXIT_NEGATIVE
