"""Test suites, as pytest classes: searches, kinds of task, metrics, one-shot and recovery methods, families, pools.

Subclass one in your own test file and name what it tests; pytest then runs all tests of the suite:

    from moe_evo.testing.searches import SearchContract

    class TestMySearch(SearchContract):
        name = "my_package.my_module:MySearch"

The package's own tests use the same suites. They need pytest, which moe_evo does not install.
"""

import pytest

# so that a failing assertion shows its values, as in a test file
pytest.register_assert_rewrite(
    *(f"{__name__}.{one}" for one in ("searches", "tasks", "methods", "families", "pools", "recovery"))
)
