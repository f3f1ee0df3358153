"""What of a vLLM request decides its keys and values; no vLLM is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixcache.client import media_keys
from prefixcache.types import unpack
from prefixcache_vllm.request_key import Adapters, can_share, media_of


def feature(offset: int, length: int, identifier: str, modality: str = "image") -> Any:
    place = SimpleNamespace(offset=offset, length=length)
    return SimpleNamespace(modality=modality, identifier=identifier, mm_position=place)


def request(*features: Any, **more: Any) -> Any:
    usual = {"prompt_embeds": None, "pooling_params": None, "lora_request": None}
    return SimpleNamespace(mm_features=list(features), **(usual | more))


def key(*features: Any, length: int = 12) -> list[int]:
    return unpack(media_keys([7] * length, media_of(request(*features)))).tolist()


def test_a_text_has_no_media_and_an_image_is_where_vllm_puts_it() -> None:
    assert list(media_of(request())) == list(media_of(SimpleNamespace(mm_features=None))) == []
    places = [item[:2] for item in media_of(request(feature(6, 2, "b"), feature(1, 4, "a")))]
    assert places == [(1, 4), (6, 2)]


def test_what_vllm_calls_by_another_name_is_another() -> None:
    cat = key(feature(2, 4, "cat"))
    assert cat == key(feature(2, 4, "cat"))
    for other in (feature(2, 4, "dog"), feature(2, 4, "cat", "video"), feature(2, 5, "cat")):
        assert key(other)[:2] == cat[:2]
        assert key(other)[2] != cat[2]


@pytest.mark.parametrize(
    "other",
    [
        (feature(2, 8, "w"), feature(4, 3, "s", "audio")),
        (feature(2, 8, "v"), feature(4, 3, "t", "audio")),
        (feature(2, 8, "v"), feature(5, 3, "s", "audio")),
        (feature(2, 8, "v"), feature(4, 4, "s", "audio")),
        (feature(2, 7, "v"), feature(4, 3, "s", "audio")),
        (feature(2, 8, "v"), feature(4, 2, "s", "audio"), feature(5, 2, "s", "audio")),
    ],
)
def test_a_video_and_the_sound_in_it_are_one_item_that_differs_if_either_does(other: Any) -> None:
    both = feature(2, 8, "v"), feature(4, 3, "s", "audio")
    ((offset, length, _),) = media_of(request(*both))
    assert (offset, length) == (2, 8)
    ((offset, length, _),) = media_of(request(feature(2, 4, "v"), feature(5, 6, "s")))
    assert (offset, length) == (2, 9)
    assert key(*both) == key(*reversed(both))
    assert key(*other)[2] != key(*both)[2]


def test_embeddings_and_pooling_are_not_said_by_tokens() -> None:
    assert can_share(request())
    assert can_share(request(feature(0, 1, "a")))
    assert not can_share(request(prompt_embeds=[0.0]))
    assert not can_share(request(pooling_params=object()))


def adapted(name: str, path: object, number: int = 1, *, load_inplace: bool = False) -> Any:
    fields = {"lora_name": name, "lora_path": str(path), "lora_int_id": number}
    return request(lora_request=SimpleNamespace(load_inplace=load_inplace, **fields))


def written(folder: Path, weights: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_text(weights)
    return folder


def test_one_adapter_has_one_name_in_all_engines(tmp_path: Path) -> None:
    tone = written(tmp_path / "tone", "old")
    one, other = Adapters(), Adapters()
    assert one.key_of(request()) is None
    key = one.key_of(adapted("tone", tone))
    assert key == other.key_of(adapted("tone", tone, number=7))
    assert key not in (one.key_of(adapted("voice", tone)), one.key_of(adapted("tone", tmp_path)))
    assert one.key_of(adapted("tone", "team/tone")) == "tone#team/tone"


def test_a_path_means_what_it_means_where_the_engine_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for home in ("a", "b"):
        folder = written(tmp_path / home / "tone", "old")
        monkeypatch.chdir(tmp_path / home)
        keys.append(Adapters().key_of(adapted("tone", "tone")))
        assert keys[-1] == Adapters().key_of(adapted("tone", folder))
    assert keys[0] != keys[1]


def test_an_adapter_that_was_trained_anew_is_another_for_engines_that_load_it(
    tmp_path: Path,
) -> None:
    before, after = Adapters(), Adapters()
    old = before.key_of(adapted("tone", written(tmp_path, "old")))
    written(tmp_path, "newer")
    assert before.key_of(adapted("tone", tmp_path)) == old, "it computes with what it has loaded"
    new = after.key_of(adapted("tone", tmp_path))
    assert new != old
    assert before.key_of(adapted("tone", tmp_path, load_inplace=True)) == new
