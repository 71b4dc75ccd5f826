"""What a run is made from: conf/ and the command line, checked, and the identity of a config. No torch."""
