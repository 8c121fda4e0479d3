"""Other tools that an engine plugs into."""
