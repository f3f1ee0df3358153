"""The eviction policies: one class per file.  Every file here is imported, and so registered."""

from importlib import import_module
from pkgutil import iter_modules

from prefixcache.core.eviction import POLICIES, policy_named

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = ["POLICIES", "policy_named"]
