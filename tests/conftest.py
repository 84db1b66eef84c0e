"""Hypothesis draws the same examples in every run, so that the suite answers the same on every machine."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "flowspace",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("flowspace")
