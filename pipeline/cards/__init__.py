"""What a published model says of itself to people, and to the hub: the README.md of its folder."""
