"""The tests, as a package: a package of this name in site-packages cannot hide them."""
