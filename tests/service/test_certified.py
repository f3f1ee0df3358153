"""Certificates, as the service reads them: what they allow, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from certificate_file import MEASURED, certificate, write
from prefixcache.certificates import Certificate, Certificates
from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.types import Again, Layout, Namespace

LAYOUT = Layout(1, 1, 4, "float32")
SPACE = Namespace("model")


def test_the_policy_is_allowed_that_is_within_with_every_kind_of_text(tmp_path: Path) -> None:
    known = Certificates.read(write(tmp_path), 0.01)
    assert known.cheapest(SPACE, LAYOUT) == Again(first=2)
    for again in (Again(first=2), Again(share=0.5)):
        known.refuse_beyond(SPACE, LAYOUT, again)
    with pytest.raises(Unsupported, match=r"0\.1300 nats per token with 'documents in another"):
        known.refuse_beyond(SPACE, LAYOUT, Again())


def test_the_threshold_is_the_service_s(tmp_path: Path) -> None:
    assert Certificates.read(write(tmp_path), 0.2).cheapest(SPACE, LAYOUT) == Again()
    assert Certificates.read(write(tmp_path), 0.005).cheapest(SPACE, LAYOUT) == Again(share=0.5)


def test_what_spares_nothing_with_some_kind_of_text_is_not_allowed(tmp_path: Path) -> None:
    known = Certificates.read(write(tmp_path), 0.01)
    with pytest.raises(Unsupported, match="100% computed again; allowed: first 2, deviation 50%"):
        known.refuse_beyond(SPACE, LAYOUT, Again(first=128))


@pytest.mark.parametrize(
    ("space", "layout", "why"),
    [
        (Namespace("model@2"), LAYOUT, "no certificate here is of this model, by that digest"),
        (Namespace("model", "lora"), LAYOUT, "not of adapter 'lora'"),
        (SPACE, Layout(1, 1, 4, "bfloat16"), "is of float32, the pool holds bfloat16"),
        (SPACE, Layout(planes=2, page_bytes=64, format="odd"), "pages in the format odd"),
    ],
)
def test_it_speaks_for_one_model_as_it_was_measured(
    tmp_path: Path, space: Namespace, layout: Layout, why: str
) -> None:
    known = Certificates.read(write(tmp_path), 0.01)
    assert known.cheapest(space, layout) is None
    with pytest.raises(Unsupported, match=why):
        known.refuse_beyond(space, layout, Again(first=2))


def test_a_folder_has_one_for_each_model(tmp_path: Path) -> None:
    write(tmp_path, "a")
    write(tmp_path, "b", model="other", measured={"none": ((0.0, 0.0), (0.5, 0.0))})
    known = Certificates.read(tmp_path, 0.01)
    assert str(known) == "model by first 2, 0.0090 nats; other none (at most 0.01)"
    assert known.cheapest(SPACE, LAYOUT) == Again(first=2)
    assert known.cheapest(Namespace("other"), LAYOUT) is None
    write(tmp_path, "c")
    with pytest.raises(InvalidRequest, match="two certificates of 'model'"):
        Certificates.read(tmp_path, 0.01)


def test_a_service_does_not_start_where_none_reaches_its_threshold(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidRequest, match=r"0\.001 nats .* best is 'deviation 50%' of 'model' w"
    ):
        Certificates.read(write(tmp_path), 0.001)
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidRequest, match="0 certificates in this folder"):
        Certificates.read(tmp_path / "none", 0.01)


def broken(**changes: Any) -> dict[str, Any]:
    return certificate() | changes


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"format": 1, "format": 2}', "is no JSON"),
        ("[]", "is no certificate"),
        (json.dumps(broken(format="prefixcache segments 2")), "is no certificate"),
        (json.dumps(broken(model="")), "names no model"),
        (json.dumps(broken(dtype=3)), "names no model"),
        (json.dumps(broken(policies={})), "no certificate reaches"),
        (json.dumps(broken(policies=[{}])), "is no whole certificate"),
        (json.dumps(broken(policies=[{"policy": "some", "kinds": {}}])), "is no whole certificate"),
        (json.dumps(broken(policies=[{"policy": "none", "kinds": {}}])), "is no whole certificate"),
        (
            json.dumps(
                broken(
                    policies=[{"policy": "none", "kinds": {"a": {"kl_mean": -1, "again_share": 0}}}]
                )
            ),
            "is no whole certificate",
        ),
        (
            '{"format": "prefixcache segments 1", "model": "m", "dtype": "float32", "policies": '
            '[{"policy": "none", "kinds": {"a": {"kl_mean": NaN, "again_share": 0}}}]}',
            "is no whole certificate",
        ),
    ],
)
def test_what_is_none_is_refused_with_its_name(tmp_path: Path, content: str, why: str) -> None:
    file = tmp_path / "made.json"
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=why):
        Certificates.read(file, 0.01)
    with pytest.raises(InvalidRequest, match="cannot read"):
        Certificates.read(tmp_path / "nothing.json", 0.01)


def test_every_policy_has_the_name_that_verify_segments_gives_it(tmp_path: Path) -> None:
    found = Certificate.read(write(tmp_path)).policies
    assert [str(one.again) for one in found] == [name for name in MEASURED if name != "all"]
