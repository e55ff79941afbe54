"""Commands for developers, which are not part of the app's bundle."""
