from __future__ import annotations

from integration.bad_input.errors_page import PAGE, page


def test_the_page_says_what_the_tests_check() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "run python -m integration.bad_input.errors_page"
    )
