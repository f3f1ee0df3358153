"""TLS: only where it must be, with certificates that rotate while the service runs."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

import prefixcache
from cli.running import call
from patience import PATIENCE_S
from prefixcache.cli.codes import EXIT_USAGE
from prefixcache.client import Tls, connect_async
from prefixcache.errors import InvalidRequest, ServiceUnavailable, Unauthenticated
from prefixcache.service.auth.certificates import Certificates
from prefixcache.types import Namespace
from service.auth.keys import TOKENS, identities
from service.service_process import LAYOUT, ServiceProcess, command, environment, running, sizes

HOST = "localhost"


def write(folder: Path, name: str, issued: trustme.LeafCert) -> tuple[Path, Path]:
    """Put a certificate and its key in place, as an operator would: by renaming."""
    chain, key = folder / f"{name}.pem", folder / f"{name}.key"
    issued.private_key_pem.write_to_path(folder / "new.key")
    (folder / "new.key").chmod(0o600)
    (folder / "new.key").rename(key)
    (folder / "new.pem").write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    (folder / "new.pem").rename(chain)
    return chain, key


class Setup:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(self.ca)
        self.chain, self.key = write(folder, "server", self.issue(HOST, "127.0.0.1"))
        self.service: ServiceProcess

    def issue(self, *names: str) -> trustme.LeafCert:
        return self.authority.issue_cert(*names, common_name=names[0])

    @property
    def port(self) -> int:
        return int(self.service.target.rpartition(":")[2])

    def serial_shown(self) -> int:
        """Connect as anybody would, and give the serial of the certificate that is shown."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection((HOST, self.port), 10) as raw,
            context.wrap_socket(raw, server_hostname=HOST) as shown,
        ):
            from cryptography import x509

            der = shown.getpeercert(binary_form=True)
            assert der is not None
            return x509.load_der_x509_certificate(der).serial_number


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """TLS, with tokens."""
    setup = Setup(tmp_path_factory.mktemp("t"))
    flags = ["--identities", str(identities(setup.folder)), "--tls-cert", str(setup.chain)]
    flags += ["--tls-key", str(setup.key)]
    with running("127.0.0.1:0", *sizes(64, 4), *flags) as setup.service:
        yield setup


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """TLS, with client certificates."""
    setup = Setup(tmp_path_factory.mktemp("m"))
    more = '[[identity]]\nname = "w"\ntenant = "acme"\ncertificates = ["worker.acme"]\n'
    flags = ["--identities", str(identities(setup.folder, more)), "--tls-cert", str(setup.chain)]
    flags += ["--tls-key", str(setup.key), "--tls-ca", str(setup.ca)]
    with running("127.0.0.1:0", *sizes(64, 4), *flags) as setup.service:
        yield setup


def test_a_token_over_tls_says_who_it_is(plain: Setup) -> None:
    with prefixcache.connect(
        f"{HOST}:{plain.port}", tls=Tls(ca=plain.ca), token=TOKENS["acme"]
    ) as client:
        client.attach("tiny", LAYOUT).acquire([1, 2, 3])
        assert list(client.snapshot().namespaces) == [Namespace("tiny", tenant="acme")]


def test_the_asynchronous_client_speaks_tls_too(plain: Setup) -> None:
    async def ask() -> int:
        async with (
            await connect_async(
                f"{HOST}:{plain.port}", tls=Tls(ca=plain.ca), token=TOKENS["boss"]
            ) as client,
            await client.attach("tiny", LAYOUT) as session,
        ):
            return (await session.acquire([1, 2, 3])).ledger.total

    assert asyncio.run(ask()) == 3


def test_a_service_that_another_authority_signed_is_not_believed(
    plain: Setup, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with (
        prefixcache.connect(
            f"{HOST}:{plain.port}", tls=Tls(ca=tmp_path / "other.pem"), token="t", timeout_s=2.0
        ) as client,
        pytest.raises(ServiceUnavailable),
    ):
        client.snapshot()


def test_who_speaks_no_tls_gets_no_answer(plain: Setup) -> None:
    with (
        prefixcache.connect(f"{HOST}:{plain.port}", token="t", timeout_s=2.0) as client,
        pytest.raises(ServiceUnavailable),
    ):
        client.snapshot()


def test_a_new_certificate_serves_new_connections_without_a_restart(plain: Setup) -> None:
    before = plain.serial_shown()
    assert plain.serial_shown() == before
    with prefixcache.connect(
        f"{HOST}:{plain.port}", tls=Tls(ca=plain.ca), token=TOKENS["acme"]
    ) as old:
        session = old.attach("tiny", LAYOUT)
        write(plain.folder, "server", plain.issue(HOST, "127.0.0.1"))
        after = plain.serial_shown()
        assert after != before
        assert session.acquire([5, 6, 7]).ledger.total == 3  # who was connected goes on
    plain.key.chmod(0o644)
    assert plain.serial_shown() == after  # nor a key from then on that others may read
    assert plain.serial_shown() == after
    assert plain.service.log().count("is a secret") == 1  # not once for each who connects
    (plain.folder / "server.pem").write_text("no certificate at all")
    assert plain.serial_shown() == after  # nothing is served that is wrong
    assert "certificates are as before" in plain.service.log()


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o644, 0o660, 0o601, 0o777], ids=oct)
def test_a_key_that_others_may_read_is_refused_at_the_start(tmp_path: Path, mode: int) -> None:
    setup = Setup(tmp_path)
    setup.key.chmod(mode)
    with pytest.raises(InvalidRequest, match=f"mode {mode:o}"):
        Certificates(setup.chain, setup.key, None)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o602])
@pytest.mark.parametrize("what", ["token file", "TLS key"])
def test_a_client_refuses_a_secret_that_others_may_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, mode: int
) -> None:
    setup = Setup(tmp_path)
    secret = tmp_path / "token"
    secret.write_text("a-token")
    if what == "TLS key":
        secret = setup.key
        monkeypatch.setenv("PREFIXCACHE_TLS_CERT", str(setup.chain))
        monkeypatch.setenv("PREFIXCACHE_TLS_KEY", str(secret))
    else:
        monkeypatch.setenv("PREFIXCACHE_TOKEN_FILE", str(secret))
    secret.chmod(mode)
    with socket.create_server(("127.0.0.1", 0)) as there:
        target = f"127.0.0.1:{there.getsockname()[1]}"
        with pytest.raises(InvalidRequest, match=rf"{what} .*mode {mode:o}.*chmod 600 {secret}"):
            prefixcache.connect(target)
        told = call("stat", "--once", "-c", target)
        assert (told.code, told.err.count("\n")) == (EXIT_USAGE, 1)
        secret.chmod(0o600)
        prefixcache.connect(target).close()


def test_a_client_certificate_says_who_it_is(mutual: Setup) -> None:
    chain, key = write(mutual.folder, "worker", mutual.issue("worker.acme"))
    tls = Tls(ca=mutual.ca, certificate=chain, key=key)
    with prefixcache.connect(f"{HOST}:{mutual.port}", tls=tls) as client:
        client.attach("tiny", LAYOUT).acquire([1, 2, 3])
        assert list(client.snapshot().namespaces) == [Namespace("tiny", tenant="acme")]


def test_a_certificate_that_no_identity_has_is_nobody(mutual: Setup) -> None:
    chain, key = write(mutual.folder, "stranger", mutual.issue("stranger.example"))
    tls = Tls(ca=mutual.ca, certificate=chain, key=key)
    with (
        prefixcache.connect(f"{HOST}:{mutual.port}", tls=tls, token=TOKENS["boss"]) as client,
        pytest.raises(Unauthenticated, match=r"stranger\.example"),
    ):
        client.snapshot()


@pytest.mark.parametrize("shown", ["none", "of another authority"])
def test_without_a_certificate_of_the_authority_there_is_no_connection(
    mutual: Setup, tmp_path: Path, shown: str
) -> None:
    tls = Tls(ca=mutual.ca)
    if shown != "none":
        chain, key = write(tmp_path, "worker", trustme.CA().issue_cert("worker.acme"))
        tls = Tls(ca=mutual.ca, certificate=chain, key=key)
    with (
        prefixcache.connect(f"{HOST}:{mutual.port}", tls=tls, timeout_s=2.0) as client,
        pytest.raises(ServiceUnavailable),  # not a refusal: there is no connection at all
    ):
        client.snapshot()


def test_the_command_line_takes_credentials_from_flags_and_from_the_environment(
    plain: Setup, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKENS["boss"] + "\n")
    (tmp_path / "token").chmod(0o600)
    at = ["--connect", f"{HOST}:{plain.port}"]
    flags = ["--tls-ca", str(plain.ca), "--token-file", str(tmp_path / "token")]
    told = subprocess.run(
        command(*flags, "stat", "--once", *at), env=environment(), capture_output=True, text=True
    )
    assert (told.returncode, "64 blocks" in told.stdout) == (0, True), told.stderr
    here = {"PREFIXCACHE_TLS_CA": str(plain.ca), "PREFIXCACHE_TOKEN": "wrong"}
    told = subprocess.run(
        command("stat", "--once", *at), env=environment() | here, capture_output=True, text=True
    )
    assert (told.returncode, told.stderr) == (1, "prefixcache: nobody has this token\n")


@pytest.mark.parametrize(
    ("flags", "lacking"),
    [
        ([], "no TLS (--tls-cert, --tls-key) and no authentication (--identities)"),
        (["tls"], "no authentication (--identities)"),
        (["identities"], "no TLS (--tls-cert, --tls-key)"),
    ],
)
def test_no_address_that_others_can_reach_without_tls_and_identities(
    plain: Setup, flags: list[str], lacking: str
) -> None:
    write(plain.folder, "server", plain.issue(HOST, "127.0.0.1"))
    given = {
        "tls": ["--tls-cert", str(plain.chain), "--tls-key", str(plain.key)],
        "identities": ["--identities", str(plain.folder / "identities.toml")],
    }
    extra = [word for flag in flags for word in given[flag]]
    told = subprocess.run(
        command("serve", "--listen", "0.0.0.0:0", *sizes(64, 4), *extra),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert told.returncode == 2
    assert lacking in told.stderr
    assert "Traceback" not in told.stderr


def test_a_token_is_never_sent_in_the_clear() -> None:
    with pytest.raises(InvalidRequest, match="in the clear"):
        prefixcache.connect("10.255.255.1:7070", token="secret", timeout_s=0.1)
