"""Stand-ins for engine packages, generated from `engines.signatures`.

What a table does not list is not there: an argument or a name that an adapter uses without listing
it is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from types import SimpleNamespace
from typing import Any

from paraserve_backend.engines.signatures import Signature, Table


class FakePackage:
    """Modules of a package; `load` finds them as `importlib.import_module` would."""

    def __init__(self, table: Table, behaviours: Mapping[str, Callable[..., Any]]) -> None:
        """Generate the package.

        Args:
            table: what it has.
            behaviours: by name, the classes and functions that do something. Their methods are
                called with what the table lists, and only if it lists them.
        """
        self._modules: dict[str, SimpleNamespace] = {}
        self._members = {each.name: each.members for each in table.members}
        names = {each.name.partition(".")[0]: each.module for each in table.signatures}
        names |= {each.name: each.module for each in table.members}
        for name, module in names.items():
            listed = [each for each in table.signatures if each.name.partition(".")[0] == name]
            made = _make(name, listed, self._members.get(name, ()), behaviours.get(name))
            setattr(self._module(module), name, made)
        for signature in table.signatures:
            if signature.fields_of is not None:
                fields = type(signature.fields_of, (), {"__signature__": _by_name(signature)})
                setattr(self._module(signature.module), signature.fields_of, fields)

    def load(self, name: str) -> Any:
        try:
            return self._modules[name]
        except KeyError:
            raise ImportError(f"No module named {name!r}") from None

    def record(self, name: str, /, **values: object) -> Any:
        """Return an object of a class with its listed members and nothing else."""
        assert values.keys() <= set(self._members[name]), name
        return SimpleNamespace(**values)

    def _module(self, name: str) -> SimpleNamespace:
        return self._modules.setdefault(name, SimpleNamespace())


def _make(
    name: str,
    listed: Iterable[Signature],
    members: Iterable[str],
    behaviour: Callable[..., Any] | None,
) -> Any:
    own = {each.name.removeprefix(f"{name}."): each for each in listed}
    if behaviour is not None and not inspect.isclass(behaviour):
        return _checked(own[name], behaviour, num_receivers=0)
    if behaviour is not None and not own:
        return behaviour  # read, caught or compared, never called
    base = behaviour or SimpleNamespace
    contents: dict[str, Any] = {"__annotations__": dict.fromkeys(members, Any)}
    for method, signature in own.items():
        if method == name:
            contents["__init__"] = _checked(signature, base.__init__, num_receivers=1)
            contents["__signature__"] = (
                _by_name(signature) if signature.fields_of is None else _ANY_ARGUMENTS
            )
        else:
            contents[method] = _method(signature, base, method)
    return type(name, (base,), contents)


def _method(signature: Signature, base: Any, method: str) -> Any:
    found = inspect.getattr_static(base, method, None)
    if isinstance(found, classmethod):
        return classmethod(_checked(signature, found.__func__, num_receivers=1))
    return _checked(signature, found or _does_nothing, num_receivers=1)


def _checked(
    signature: Signature, behaviour: Callable[..., Any], *, num_receivers: int
) -> Callable[..., Any]:
    def call(*receivers: Any, **arguments: Any) -> Any:
        unknown = arguments.keys() - set(signature.arguments)
        if unknown or len(receivers) > num_receivers:
            raise TypeError(f"{signature.name} takes no {sorted(unknown) or receivers[1:]}")
        return behaviour(*receivers, **arguments)

    receivers = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)][:num_receivers]
    call.__signature__ = _by_name(signature, receivers)  # type: ignore[attr-defined]
    return call


def _by_name(signature: Signature, receivers: Iterable[Parameter] = ()) -> inspect.Signature:
    named = [Parameter(each, Parameter.KEYWORD_ONLY, default=None) for each in signature.arguments]
    return inspect.Signature([*receivers, *named])


def _does_nothing(_receiver: object, **_arguments: object) -> None:
    pass


_ANY_ARGUMENTS = inspect.Signature([Parameter("arguments", Parameter.VAR_KEYWORD)])
