"""The simulators: every ExoRL task as a dm_env, its vectorised form and its rewards."""
