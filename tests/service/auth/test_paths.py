"""What the service is told to use, at paths that a stranger could change: refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from prefixcache.errors import InvalidRequest
from prefixcache.private_files import check_path
from prefixcache.service.auth.certificates import Certificates
from prefixcache.service.auth.identity import Identities
from prefixcache.service.grpc.listener import Listener
from prefixcache.service.persistence.directory import StateDirectory
from service.auth.keys import identities


def listen(folder: Path) -> None:
    listener = Listener([f"unix:{folder}/cache.sock"])
    try:
        listener.claim()
    finally:
        listener.close()


def keep_state(folder: Path) -> None:
    StateDirectory(folder / "state").close()


def read_identities(folder: Path) -> None:
    Identities(identities(folder))


def read_certificates(folder: Path) -> None:
    issued = trustme.CA().issue_cert("localhost")
    chain, key = folder / "chain.pem", folder / "key.pem"
    issued.cert_chain_pems[0].write_to_path(chain)
    issued.private_key_pem.write_to_path(key)
    for file in (chain, key):
        file.chmod(0o600)
    Certificates(chain, key, None)


USES = (listen, keep_state, read_identities, read_certificates)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o757], ids=oct)
@pytest.mark.parametrize("below", ["", "below", "below/further"])
def test_a_path_through_a_folder_that_others_may_write_to_is_refused(
    tmp_path: Path, use: Callable[[Path], None], mode: int, below: str
) -> None:
    folder = tmp_path / "open"
    (folder / below).mkdir(0o700, parents=True)
    folder.chmod(mode)
    with pytest.raises(InvalidRequest, match=f"chmod go-w {folder}"):
        use(folder / below)
    folder.chmod(0o755)
    use(folder / below)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("below", ["", "below"])
def test_a_path_through_a_folder_of_somebody_else_is_refused_also_to_root(
    tmp_path: Path, use: Callable[[Path], None], below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "theirs"
    (folder / below).mkdir(0o700, parents=True)
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(InvalidRequest, match="belongs to user"):
        use(folder / below)


def test_in_a_folder_with_the_sticky_bit_others_cannot_replace_what_is_ours(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "ours").mkdir(0o700, parents=True)
    shared.chmod(0o1777)
    for use in USES:
        use(shared / "ours")


def test_symlinks_are_followed_and_what_they_pass_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "open" / "real").mkdir(0o700, parents=True)
    (tmp_path / "link").symlink_to("open/../open/real")
    (tmp_path / "circle").symlink_to("circle")
    check_path(tmp_path / "link" / "file", "--state")
    check_path(tmp_path / "circle", "--state")  # whoever opens it says what is wrong
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(InvalidRequest, match="/open can be written by other users"):
        check_path(tmp_path / "link" / "file", "--state")
