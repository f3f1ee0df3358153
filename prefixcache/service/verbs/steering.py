"""Steering: what is kept and who may hold how much."""

from __future__ import annotations

from dataclasses import replace
from time import monotonic

import structlog

from prefixcache.client import codec
from prefixcache.errors import InvalidRequest, NotFound
from prefixcache.service.verbs.base import Verbs
from prefixcache.service.workers import Asker
from prefixcache.types import Namespace, Pinned, QuotaInfo, Reset, Unpinned
from prefixcache.v1 import prefixcache_pb2 as pb

log = structlog.get_logger(__name__)


class Steering(Verbs):
    """The verbs of operators."""

    def reset(self, asker: Asker, request: pb.ResetRequest) -> Reset:
        """Make a namespace forget."""
        namespace = self._unsealed(asker, self._named(asker, request))
        answer = self._cache().reset(namespace)
        log.info("reset", namespace=str(namespace), blocks=answer.num_blocks)
        return answer

    def _unsealed(self, asker: Asker, named: Namespace) -> Namespace:
        """Give the namespace that an admin names as it was shown: without its salt.

        Raises:
            NotFound: it is named so by somebody else, or is not there.
        """
        if not named.salt.startswith("sealed-"):
            return named
        for one in self._cache().namespaces():
            is_shown = asker.identity.admin and replace(one, salt=codec.seal(one.salt)) == named
            if is_shown or one == named:
                return one
        raise NotFound(
            f"no namespace has the salt {named.salt!a}: answers show such a text in the place of a "
            "salt; name the salt itself (an admin may name what is shown, while it is there)"
        )

    def pin(self, asker: Asker, request: pb.PinRequest) -> Pinned:
        """Let a prefix be evicted last.

        Raises:
            InvalidRequest: for longer than is allowed.
        """
        if not 0 < request.ttl_s <= self.settings.max_pin:
            raise InvalidRequest(
                f"a pin may last up to {self.settings.max_pin:g} s (--max-pin), not "
                f"{request.ttl_s:g}"
            )
        namespace = self._unsealed(asker, self._named(asker, request))
        return self._cache().pin(namespace, request.tokens, ttl_s=request.ttl_s, now=monotonic())

    def unpin(self, asker: Asker, request: pb.UnpinRequest) -> Unpinned:
        """End one pin, or all of a namespace."""
        namespace = self._unsealed(asker, self._named(asker, request))
        return self._cache().unpin(namespace, request.tokens)

    def quota(self, asker: Asker, request: pb.QuotaRequest) -> QuotaInfo:
        """Tell, or set, what a tenant or a namespace may hold.

        Raises:
            InvalidRequest: it does not say whose.
            NotFound: it names another tenant.
            PermissionDenied: only an admin sets quotas.
        """
        scope: Namespace | str
        match request.WhichOneof("scope"):
            case "namespace":
                scope = codec.read_namespace(request.namespace)
            case "tenant":
                scope = request.tenant
            case _:
                raise InvalidRequest("name a namespace or a tenant")
        identity = asker.identity
        if isinstance(scope, str):
            if not (identity.admin or identity.tenant in (None, scope)):
                raise NotFound(f"no tenant {scope!r}")
        else:
            scope = self._unsealed(asker, identity.own(scope))
        if not request.set:
            return self._cache().quota(scope)
        identity.refuse_unless_admin("set quotas")
        answer = self._cache().set_quota(
            scope,
            max_held=request.max_held if request.HasField("max_held") else None,
            guaranteed=request.guaranteed,
            now=monotonic(),
        )
        log.info("quota", scope=str(scope), max_held=answer.max_held, guaranteed=answer.guaranteed)
        return answer
