"""Everything that runs on the device."""
