"""The ``clip2fl site`` commands: kits for sites, their names and keys, their nodes."""
