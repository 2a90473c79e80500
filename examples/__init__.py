"""Small real prefixes for the demo model, and the scripts that trained and measured them."""
