import os

from prefixcache.core import (
    account,
    block_manager,
    block_pool,
    build,
    cache,
    lease,
    lessor,
    node,
    radix_tree,
)


def test_all_of_the_core_runs_as_what_was_asked_for():
    files = (account, block_manager, block_pool, cache, lease, lessor, node, radix_tree)
    compiled = [not module.__file__.endswith(".py") for module in files]
    assert compiled == [build.IS_COMPILED] * len(files)
    if "PREFIXCACHE_EXPECT_COMPILED" in os.environ:
        assert build.KIND == "compiled"
