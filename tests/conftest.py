from hypothesis import settings

# A loaded machine is no failure, and a test that fails in one run fails in the next.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
