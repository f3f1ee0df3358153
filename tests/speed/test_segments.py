"""The demo model's certificate goes into its document, with a picture of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefixcache.certificates import FORMAT
from prefixcache.plain_json import json_text
from prefixcache_bench.speed import segments
from prefixcache_worker.segments.certificate import reached_by
from prefixcache_worker.segments.moved import POLICIES


def certificate() -> dict[str, Any]:
    policies = []
    for at, policy in enumerate(POLICIES):
        share = at / (len(POLICIES) - 1)
        kl = 0.1 * (1 - share) ** 2
        of = {
            "again_share": share, "kl_mean": kl, "kl_p95": 2 * kl, "kl_max": 3 * kl,
            "kl_worst_text": kl, "same_best_share": share, "same_answers": 1, "num_answers": 1,
            "reaches": kl <= 0.01,
        }  # fmt: skip
        policies.append({"policy": str(policy), **of, "kinds": {"one kind": of, "another": of}})
    return {
        "format": FORMAT, "model": "m@1", "dtype": "float32", "threshold_kl": 0.01,
        "reached_by": reached_by(policies), "policies": policies,
        "rows": [{"answer_tokens": 24}] * len(POLICIES),
    }  # fmt: skip


@pytest.mark.slow
def test_a_certificate_is_published_with_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "segments.md"
    document.write_text("<!-- figures: certificate -->\n<!-- end: certificate -->\nthe rest\n")
    monkeypatch.setattr(segments, "DOCUMENT", document)
    monkeypatch.setattr(segments, "PICTURE", tmp_path / "quality.svg")
    file = tmp_path / "c.json"
    file.write_text(json_text(certificate()))
    assert segments.main(["--certificate", str(file), "--publish"]) == 0
    text = document.read_text()
    assert capsys.readouterr().out.strip() in text
    assert "KL of at most 0.01 with every kind of text: deviation 50%" in text
    assert text.endswith("<!-- end: certificate -->\nthe rest\n")
    drawn = (tmp_path / "quality.svg").read_text()
    assert "one kind" in drawn


def test_another_file_is_no_certificate(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"format": "another"}))
    with pytest.raises(SystemExit, match="is no certificate"):
        segments.main(["--certificate", str(file)])
