"""The table of what is called, held against packages that are the same or a little different."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from paraserve_backend.engines.signatures import (
    TENSORRT_LLM,
    VLLM,
    Members,
    Signature,
    Table,
    differences,
)
from tests.support.fake_engines import Seen, fake_tensorrt_llm, fake_vllm
from tests.support.fake_package import FakePackage

FAKES: dict[str, Callable[[Seen], FakePackage]] = {
    "tensorrt-llm": fake_tensorrt_llm,
    "vllm": fake_vllm,
}
each_table = pytest.mark.parametrize("table", [TENSORRT_LLM, VLLM], ids=lambda t: t.engine)


@each_table
def test_a_package_as_the_table_says_does_not_differ(table: Table) -> None:
    assert differences(table, FAKES[table.engine](Seen()).load) == ()


@each_table
def test_a_package_that_is_not_installed_is_said_once_for_each_module(table: Table) -> None:
    found = differences(table, FakePackage(replace(table, signatures=(), members=()), {}).load)
    modules = {each.module for each in table.signatures} | {each.module for each in table.members}
    assert len(found) == len(modules)
    assert all("cannot be imported" in sentence for sentence in found)


@pytest.mark.parametrize(
    ("table", "signature", "argument"),
    [
        (table, signature, argument)
        for table in (TENSORRT_LLM, VLLM)
        for signature in table.signatures
        for argument in signature.arguments
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_an_argument_that_is_gone_is_named(
    table: Table, signature: Signature, argument: str
) -> None:
    arguments = tuple(each for each in signature.arguments if each != argument)
    older = _with(table, signature, replace(signature, arguments=arguments))
    name = f"{signature.module}.{signature.name}"
    found = differences(table, FakePackage(older, {}).load)
    assert found == (f"{name} takes no argument {argument}",)


@pytest.mark.parametrize(
    ("table", "members", "member"),
    [
        (table, members, member)
        for table in (TENSORRT_LLM, VLLM)
        for members in table.members
        for member in members.members
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_member_that_is_gone_is_named(table: Table, members: Members, member: str) -> None:
    fewer = replace(members, members=tuple(each for each in members.members if each != member))
    older = replace(
        table, members=tuple(fewer if each is members else each for each in table.members)
    )
    found = differences(table, FakePackage(older, {}).load)
    assert found == (f"{members.module}.{members.name} has no {member}",)


def test_a_name_that_is_gone_is_named() -> None:
    gone = next(each for each in VLLM.signatures if each.name == "AsyncLLM.shutdown")
    older = replace(VLLM, signatures=tuple(s for s in VLLM.signatures if s is not gone))
    found = differences(VLLM, FakePackage(older, {}).load)
    assert found == ("vllm.v1.engine.async_llm has no AsyncLLM.shutdown",)


def test_an_argument_that_a_release_needs_and_we_do_not_give_is_named() -> None:
    def get_metrics_snapshot(registry: object) -> object:
        return registry

    package = fake_vllm(Seen())
    package.load("vllm.v1.metrics.reader").get_metrics_snapshot = get_metrics_snapshot
    assert differences(VLLM, package.load) == (
        "vllm.v1.metrics.reader.get_metrics_snapshot needs an argument registry, which is not "
        "given",
    )


def _with(table: Table, old: Signature, new: Signature) -> Table:
    return replace(
        table, signatures=tuple(new if each is old else each for each in table.signatures)
    )
