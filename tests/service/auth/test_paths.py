"""What the service is told to use, at paths that a stranger could change: refused."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from prefixcache.errors import InvalidRequest
from prefixcache.private_files import check_path, own_folder
from prefixcache.service.auth.certificates import Certificates
from prefixcache.service.auth.identity import Identities
from prefixcache.service.grpc.listener import Listener
from prefixcache.service.persistence.directory import StateDirectory
from service.auth.keys import identities
from service.events.publishing import published
from service.http.scraped import free_port


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


def publish_events(folder: Path) -> None:
    pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    asyncio.run(published(f"ipc://{folder}/events", None))
    asyncio.run(published(f"tcp://127.0.0.1:{free_port()}", f"ipc://{folder}/replay"))


USES = (listen, keep_state, read_identities, read_certificates, publish_events)


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


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077, 0o777], ids=oct)
def test_folders_that_are_made_are_this_user_s_alone_whatever_the_umask(
    tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        made = own_folder(tmp_path / "home" / "cache" / "ours", "weights")
    finally:
        os.umask(before)
    assert made == tmp_path / "home" / "cache" / "ours" / "weights"
    for folder in (made, *list(made.parents)[:3]):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_others_may_write_no_more_to_the_folder_of_an_earlier_version(tmp_path: Path) -> None:
    base = tmp_path / "ours"
    (base / "weights").mkdir(0o755, parents=True)
    base.chmod(0o777)
    own_folder(base, "weights")
    assert base.stat().st_mode & 0o777 == 0o755
    (base / "weights").chmod(0o775)
    with pytest.raises(InvalidRequest, match=r"others may write there: .*mode 775"):
        own_folder(base, "weights")


def test_a_folder_of_somebody_else_is_none_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ours" / "weights").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="is no folder"):
        own_folder(tmp_path / "file")
    if os.geteuid() == 0:
        os.chown(tmp_path / "ours", 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(InvalidRequest, match="belongs to user"):
        own_folder(tmp_path / "ours", "weights")
