"""Names of version 0.1 that still work, with a warning; this file goes with the next release."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])

_SOURCES = {"full": "transcoders", "kept": "feature_map"}


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """To be called by the old name: the warning points at who called it."""
    warnings.warn(f"{old} is now {new}.", DeprecationWarning, stacklevel=stacklevel)


def form_renamed(method: Method) -> Method:
    """Let a method with an argument `source` take `form`, "full" and "kept" as well."""

    @functools.wraps(method)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if "form" in kwargs:
            kwargs["source"] = kwargs.pop("form")
        if not _SOURCES.keys().isdisjoint([*args, kwargs.get("source")]):
            warn_renamed("form='full' or 'kept'", "source='transcoders' or 'feature_map'")
        args = tuple(_SOURCES.get(value, value) for value in args)
        kwargs = {name: _SOURCES.get(value, value) for name, value in kwargs.items()}
        return method(*args, **kwargs)

    return cast(Method, renamed)
