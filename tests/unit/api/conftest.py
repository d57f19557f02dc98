"""Property tests here have no deadline: the machine may be busy with a cluster."""

from hypothesis import settings

settings.register_profile("api", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("api")
