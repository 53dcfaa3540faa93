"""Contract suites, as pytest classes, of searches, kinds of task, metrics, one-shot methods, families and pools.

Subclass one in a test file of yours and say what it is about; pytest then finds all its tests:

    from moe_evo.testing.searches import SearchContract

    class TestMySearch(SearchContract):
        name = "my_package.my_module:MySearch"

The suites of this package's own tests are the very same. They need pytest, which moe_evo does not install.
"""

import pytest

# so that a failing assertion shows its values, as in a test file
pytest.register_assert_rewrite(*(f"{__name__}.{one}" for one in ("searches", "tasks", "methods", "families", "pools")))
