"""Settings of all tests."""

from hypothesis import settings

settings.register_profile("shared machines", deadline=None)  # the time of an example says nothing there
settings.load_profile("shared machines")
