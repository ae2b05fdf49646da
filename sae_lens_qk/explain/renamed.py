"""Names of version 0.1 that still work, with a warning; this file goes with the next release."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])

_SOURCES = {"full": "transcoders", "kept": "feature_map"}


def warn_renamed(
    old: str,
    new: str,
    stacklevel: int = 3,
) -> None:
    """To be called by the old name: the warning points at who called it."""
    warnings.warn(f"{old} is now {new}.", DeprecationWarning, stacklevel=stacklevel)


def form_renamed(method: Method) -> Method:
    """Let a method with an argument `source` take `form`, "full" and "kept" as well."""

    @functools.wraps(method)
    def renamed(
        self: Any,
        *args: Any,
        form: str | None = None,
        **kwargs: Any,
    ) -> Any:
        if form is not None:
            kwargs["source"] = form
        # no comprehension, which would be a frame between the caller and the warning
        for name in kwargs:
            kwargs[name] = _new_source(kwargs[name])
        return method(self, *map(_new_source, args), **kwargs)

    return cast(Method, renamed)


def _new_source(value: Any) -> Any:
    if not isinstance(value, str) or value not in _SOURCES:
        return value
    warn_renamed(f"form={value!r}", f"source={_SOURCES[value]!r}", stacklevel=4)
    return _SOURCES[value]
