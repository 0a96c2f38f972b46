"""The stages. A new one is a file `stages/<group>/<kind>.py` and a line here."""
