from __future__ import annotations

import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.rpc.addresses import split_address, with_port


@pytest.mark.parametrize("address", ["", "8000", "host:", ":8000", "host:http", "host:65536"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="write it as host:port"):
        split_address(address)


@pytest.mark.parametrize(
    ("address", "parts"), [("node-1:8001", ("node-1", 8001)), ("[::1]:80", ("::1", 80))]
)
def test_an_address_is_split_at_its_last_colon(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


def test_another_port_keeps_the_host_as_it_is_written() -> None:
    assert with_port("[::1]:0", 80) == "[::1]:80"
