"""A plugin of pytest: Triton's interpreter without work that changes no result, half of its time with Triton 3.9."""

import dataclasses
from typing import Any

from triton.runtime import interpreter


def skip_idle_work() -> None:
    # An overflow check computes its condition in 64 bits and drops it, unless the options say debug.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # A launch replaces the functions of `triton.language` by interpreted ones. Each call of a helper does so again for
    # the modules that it sees, and nothing takes that back.
    replaced: set[int] = set()

    def call(helper: Any, *args: Any, **kwargs: Any) -> Any:
        if id(helper.fn.__globals__) not in replaced:
            interpreter._patch_lang(helper.fn)
            replaced.add(id(helper.fn.__globals__))
        return helper.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


pytest_configure = skip_idle_work
