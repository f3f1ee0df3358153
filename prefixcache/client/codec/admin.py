"""Answers of the verbs that say what is kept, and who may hold how much."""

from __future__ import annotations

from prefixcache.client.codec.words import read_shown_namespace, show_namespace
from prefixcache.types import Checked, QuotaInfo
from prefixcache.v1 import prefixcache_pb2 as pb


def read_check(message: pb.CheckResponse) -> Checked:
    """Read how a check went."""
    return Checked(message.runs, message.failure, tuple(message.left_out))


def write_quota(answer: QuotaInfo, message: pb.QuotaResponse) -> None:
    """Fill `message`."""
    write_quota_info(answer, message.quota)


def read_quota(message: pb.QuotaResponse) -> QuotaInfo:
    """Read what `write_quota` wrote."""
    return read_quota_info(message.quota)


def write_quota_info(word: QuotaInfo, message: pb.QuotaInfo) -> None:
    """Fill `message`."""
    message.tenant = word.tenant
    if word.namespace is not None:
        message.namespace.SetInParent()
        show_namespace(word.namespace, message.namespace)
    if word.max_held is not None:
        message.max_held = word.max_held
    message.guaranteed = word.guaranteed
    message.num_held = word.num_held
    message.num_stored = word.num_stored


def read_quota_info(message: pb.QuotaInfo) -> QuotaInfo:
    """Read what `write_quota_info` wrote."""
    return QuotaInfo(
        tenant=message.tenant,
        namespace=(
            read_shown_namespace(message.namespace) if message.HasField("namespace") else None
        ),
        max_held=message.max_held if message.HasField("max_held") else None,
        guaranteed=message.guaranteed,
        num_held=message.num_held,
        num_stored=message.num_stored,
    )
