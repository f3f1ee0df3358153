"""The eviction policies: one class per file.  Every file here is imported, and so registered."""

from importlib import import_module
from pkgutil import iter_modules

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
