"""Tiers. The quick one runs everywhere; RECURRA_TEST_TIER=nightly adds what is marked slow and
raises the counts of the property tests and of the random splits."""

from __future__ import annotations

import faulthandler

from support import NIGHTLY

faulthandler.enable()

try:
    import hypothesis
except ImportError:  # as where ci/gpu.sh runs: the tests that need it fail to import it themselves
    hypothesis = None
if hypothesis is not None:
    hypothesis.settings.register_profile(
        "quick", max_examples=150, derandomize=True, deadline=None, database=None
    )
    hypothesis.settings.register_profile("nightly", max_examples=20_000, deadline=None)
    hypothesis.settings.load_profile("nightly" if NIGHTLY else "quick")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: nightly tier only")
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(config, items):
    if NIGHTLY:
        return
    # Left out, not skipped: a run of the quick tier shows no skips that nobody reads.
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]
