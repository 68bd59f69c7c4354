"""What was explored is kept: the tests of the group "explorer" run in one process and share it."""

from __future__ import annotations

import functools

from nvmx_lab.nested.config import Config
from nvmx_lab.nested.explorer import Exploration, explore


@functools.cache
def explored(
    kvm: str,
    sync: str | None = None,
    without: tuple[str, ...] = (),
    depth: int | None = None,
    **options: bool,
) -> Exploration:
    """Explore once for all tests; every field on its own only for a policy."""
    config = Config.of(kvm, sync, **options)
    return explore(config, without=without, depth=depth, each_field=sync is not None)
