"""Shapes of a decoder layer's modules: they follow from its sizes, whatever the family."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from paraserve_backend.architectures.spec import LayerModule, Module


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def shape(self, module: Module) -> tuple[int, ...]:
        """The weight's shape, `[outputs, inputs]` for a matrix."""
        query = self.num_heads * self.head_dim
        keys = self.num_kv_heads * self.head_dim
        match module:
            case Module.QUERY:
                return (query, self.hidden)
            case Module.KEY | Module.VALUE:
                return (keys, self.hidden)
            case Module.QKV:
                return (query + 2 * keys, self.hidden)
            case Module.OUTPUT:
                return (self.hidden, query)
            case Module.GATE | Module.UP:
                return (self.intermediate, self.hidden)
            case Module.GATE_UP:
                return (2 * self.intermediate, self.hidden)
            case Module.DOWN:
                return (self.hidden, self.intermediate)
            case Module.QUERY_NORM | Module.KEY_NORM:
                return (self.head_dim,)
        return (self.hidden,)


def layer_modules(
    sizes: LayerSizes, names: Mapping[Module, str], biased: Collection[Module] = ()
) -> tuple[LayerModule, ...]:
    """The modules that `names` lists, in its order, which is that of a forward pass."""
    return tuple(
        LayerModule(module=module, name=name, shape=sizes.shape(module), bias=module in biased)
        for module, name in names.items()
    )
