"""Images decoded once per data set and kept on disk as raw pixels."""
