"""How each kind of engine wants the codes named and declared."""
