"""The methods that a model can be evaluated with: those that come along, registered ones, and classes by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TypeVar

from sparq.config import SparqConfig
from sparq.lm_eval import methods
from sparq.lm_eval.methods import Method

METHODS: dict[str, type | None] = {
    "dense": None,
    "sparq": SparqConfig,
    "sparq_variant": methods.SparqVariant,
    "oracle": methods.Oracle,
    "window": methods.Window,
    "h2o": methods.H2O,
    "quest": methods.Quest,
    "pages": methods.Pages,
    "rocket": methods.Rocket,
}

MethodClass = TypeVar("MethodClass", bound=type[Method])


def register_method(name: str) -> Callable[[MethodClass], MethodClass]:
    """A decorator that makes a method of your own known to the harness's model `sparq` and to the comparison:

        @register_method("mine")
        @dataclass(frozen=True, kw_only=True, slots=True)
        class Mine(Method): ...

    From then on `method=mine` takes it, and the class's fields are its knobs. Without registering it, `method` takes
    "module:Class".

    Args:
        name: a Python identifier that no other method has. A class may be registered anew, as a notebook does it whose
            cell runs twice.

    Raises:
        TypeError: what is decorated is no subclass of `sparq.lm_eval.Method`, or leaves some of it abstract.
        ValueError: not such a name.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be a Python identifier, got {name!r}")

    def register(cls: MethodClass) -> MethodClass:
        _check_class(cls, "what is registered")
        known = METHODS.get(name)
        if name in METHODS and (known is None or _where(known) != _where(cls)):
            raise ValueError(f"name must be one that no method has yet, got {name!r}; taken are {', '.join(METHODS)}")
        METHODS[name] = cls
        return cls

    return register


def find_method(name: str) -> type | None:
    """The class whose fields are the knobs of the method of that name, or of "module:Class"; None where it has none.

    Raises:
        TypeError: the class is no subclass of `Method`, or leaves some of it abstract.
        ValueError: there is no such method, no such module, or no such class in it.
    """
    if isinstance(name, str) and ":" in name:
        return _imported(name)
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, or module:Class, got {name!r}")
    return METHODS[name]


def _imported(name: str) -> type[Method]:
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise ValueError(
            f"method must name a module that can be imported, got {name!r}: {error}; PYTHONPATH says where else to look"
        ) from error
    cls = getattr(module, class_name, None)
    if cls is None:
        raise ValueError(f"method must name a class of {module_name}, got {name!r}: there is no {class_name!r}")
    _check_class(cls, f"method={name!r}")
    return cls


def _check_class(cls: object, what: str) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise TypeError(f"{what} must be a subclass of sparq.lm_eval.Method, got {cls!r}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise TypeError(f"{what} must define {missing}, got {cls!r}, which does not")


def _where(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__
