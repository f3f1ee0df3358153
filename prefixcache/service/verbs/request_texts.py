"""The texts of a request: found by its description, so that no field of a new verb is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from prefixcache.texts import MAX_TEXT, check_text


def check_texts(message: Any) -> None:
    """Refuse a message with a text that cannot be kept or shown.  O(its texts).

    Raises:
        InvalidRequest: as `check_text` says.
    """
    _checker(message.DESCRIPTOR)(message)


@cache
def _checker(descriptor: Descriptor) -> Callable[[Any], None]:
    texts = [field.name for field in descriptor.fields if _is_text(field) and not _is_many(field)]
    lists = [field.name for field in descriptor.fields if _is_text(field) and _is_many(field)]
    inner = [
        (field.name, _checker(field.message_type), _is_many(field))
        for field in descriptor.fields
        if field.message_type is not None and _has_texts(field.message_type)
    ]

    def check(message: Any) -> None:
        for name in texts:
            text = getattr(message, name)
            # Nearly all are short, plain ASCII: told in no time.
            if text and not (text.isascii() and text.isprintable() and len(text) <= MAX_TEXT):
                check_text(text, name)
        for name in lists:
            for text in getattr(message, name):
                check_text(text, name)
        for name, check_inner, is_many in inner:
            if is_many:
                for one in getattr(message, name):
                    check_inner(one)
            elif message.HasField(name):
                check_inner(getattr(message, name))

    return check


@cache
def _has_texts(descriptor: Descriptor) -> bool:
    return any(
        _is_text(field) or (field.message_type is not None and _has_texts(field.message_type))
        for field in descriptor.fields
    )


def _is_text(field: FieldDescriptor) -> bool:
    return field.type == FieldDescriptor.TYPE_STRING


def _is_many(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated)
