"""The verbs that say what is kept and who may hold how much."""

from __future__ import annotations

from collections.abc import Callable, Generator
from time import monotonic
from typing import Final, TypeVar

import structlog

from prefixcache.client import codec
from prefixcache.errors import InvalidRequest, NotFound, PermissionDenied
from prefixcache.service.verbs.base import Verbs
from prefixcache.service.worker import Asker
from prefixcache.types import Namespace, Pinned, QuotaInfo, Reset, Unpinned
from prefixcache.v1 import prefixcache_pb2 as pb

T = TypeVar("T")

_LOOKED_AT: Final = 32
"""Namespaces whose salts are compared in one go."""

log = structlog.get_logger(__name__)


class AdminVerbs(Verbs):
    """The verbs of operators."""

    def reset(self, asker: Asker, request: pb.ResetRequest) -> Reset | Generator[None, None, Reset]:
        """Make a namespace forget; or what lies on disk or elsewhere, of all the asker may name.

        Raises:
            InvalidRequest: it asks for both.
            PermissionDenied: there are models that the asker may not name.
        """
        if request.unnamed:
            if request.HasField("namespace") or request.namespace_index:
                raise InvalidRequest("a reset names a namespace, or is of those without a name")
            return self._reset_unnamed(asker)
        resets = self.backing.resets

        def do(namespace: Namespace) -> Reset:
            if self.backing.cache is None and resets is not None:  # no worker has attached yet
                resets.advance(namespace)
                return Reset(0, 0)
            answer = self._cache().reset(namespace)
            log.info("reset", namespace=str(namespace), blocks=answer.num_blocks)
            return answer

        return self._with(asker, self._named(asker, request), do)

    def _reset_unnamed(self, asker: Asker) -> Reset:
        identity, resets = asker.identity, self.backing.resets
        if "*" not in identity.models:
            raise PermissionDenied(
                f"{identity.name} may not use every model, so it may not reset what nobody has "
                "named: name each namespace"
            )
        if resets is not None:
            tenant = None if identity.admin else identity.tenant
            resets.advance_all(tenant)
            if tenant is None and self.backing.cache is not None:
                self.backing.cache.forget_found()
            log.info("reset of all that lies on disk or elsewhere", tenant=tenant)
        return Reset(0, 0)

    def _with(
        self, asker: Asker, named: Namespace, do: Callable[[Namespace], T]
    ) -> T | Generator[None, None, T]:
        """Do something with a namespace, which an admin may name as it was shown: in steps then."""
        if not named.salt.startswith("sealed-"):
            return do(named)
        return self._with_sealed(asker, named, do)

    def _with_sealed(
        self, asker: Asker, named: Namespace, do: Callable[[Namespace], T]
    ) -> Generator[None, None, T]:
        """Find a namespace without its salt, looking at some dozen in one go.

        Raises:
            NotFound: it is named so by somebody else, or is not there.
        """
        salts = self._cache().namespaces() if asker.identity.admin else []
        for number, one in enumerate(salts, 1):
            if one._replace(salt=codec.seal(one.salt)) == named and self._cache().knows(one):
                return do(one)
            if number % _LOOKED_AT == 0:
                yield
        if self._cache().knows(named):  # somebody's salt may be such a text
            return do(named)
        raise NotFound(
            f"no namespace has the salt {named.salt!a}: answers show such a text in the place of a "
            "salt; name the salt itself (an admin may name what is shown, while it is there)"
        )

    def pin(self, asker: Asker, request: pb.PinRequest) -> Pinned | Generator[None, None, Pinned]:
        """Let a prefix be evicted last.

        Raises:
            InvalidRequest: for longer than is allowed.
        """
        if not 0 < request.ttl_s <= self.settings.max_pin:
            raise InvalidRequest(
                f"a pin may last up to {self.settings.max_pin:g} s (--max-pin), not "
                f"{request.ttl_s:g}"
            )

        def do(namespace: Namespace) -> Pinned:
            now = monotonic()
            return self._cache().pin(namespace, request.tokens, ttl_s=request.ttl_s, now=now)

        return self._with(asker, self._named(asker, request), do)

    def unpin(
        self, asker: Asker, request: pb.UnpinRequest
    ) -> Unpinned | Generator[None, None, Unpinned]:
        """End one pin, or all of a namespace."""

        def do(namespace: Namespace) -> Unpinned:
            return self._cache().unpin(namespace, request.tokens)

        return self._with(asker, self._named(asker, request), do)

    def quota(
        self, asker: Asker, request: pb.QuotaRequest
    ) -> QuotaInfo | Generator[None, None, QuotaInfo]:
        """Tell, or set, what a tenant or a namespace may hold.

        Raises:
            InvalidRequest: it does not say whose.
            NotFound: it names another tenant.
            PermissionDenied: only an admin sets quotas.
        """
        match request.WhichOneof("scope"):
            case "namespace":
                named = asker.identity.own(codec.read_namespace(request.namespace))
                return self._with(asker, named, lambda one: self._quota(asker, request, one))
            case "tenant":
                identity = asker.identity
                if not (identity.admin or identity.tenant in (None, request.tenant)):
                    raise NotFound(f"no tenant {request.tenant!r}")
                return self._quota(asker, request, request.tenant)
            case _:
                raise InvalidRequest("name a namespace or a tenant")

    def _quota(self, asker: Asker, request: pb.QuotaRequest, scope: Namespace | str) -> QuotaInfo:
        if not request.set:
            return self._cache().quota(scope)
        asker.identity.refuse_unless_admin("set quotas")
        answer = self._cache().set_quota(
            scope,
            max_held=request.max_held if request.HasField("max_held") else None,
            guaranteed=request.guaranteed,
            now=monotonic(),
        )
        log.info("quota", scope=str(scope), max_held=answer.max_held, guaranteed=answer.guaranteed)
        return answer
